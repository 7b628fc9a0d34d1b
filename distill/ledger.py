"""Rank 0's durable record of finished blocks: blocks/NN.safetensors and one line each in ledger.jsonl."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load, load_file
from torch import Tensor

from distill.files import DiskError, write_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One finished block. `status` is "finished", or "diverged" when its loss became NaN or infinite at step
    `diverged_at` and the last finite weights were kept. Relative errors have no unit; seconds are of training alone."""

    block: int
    name: str
    rank: int
    steps: int
    status: str
    rel_error_first: float
    rel_error_last: float
    seconds: float
    finished_at_s: float
    sha256: str = ""
    generation: int = 0
    diverged_at: int | None = None
    rel_error_held_out: float | None = None


class Ledger:
    """The finished blocks of one run directory. Only rank 0 writes it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "ledger.jsonl"
        self._blocks = run_dir / "blocks"
        self.entries: dict[int, Entry] = {}
        for line in self._path.read_text(errors="replace").splitlines() if self._path.exists() else ():
            self._believe(line)

    def _believe(self, line: str) -> None:
        """Take a line of the file for true only if it is whole and its block's file has the recorded checksum."""
        try:
            entry = Entry(**json.loads(line))
            found = hashlib.sha256(self.file(entry.block).read_bytes()).hexdigest()
        except (ValueError, TypeError, OSError) as error:
            log.warning("ledger: a line is not usable and its block will be trained again (%s)", error)
            return
        if found != entry.sha256:
            log.warning("ledger: blocks/%02d.safetensors is damaged; the block will be trained again", entry.block)
            return
        self.entries[entry.block] = entry

    def file(self, block: int) -> Path:
        return self._blocks / f"{block:02d}.safetensors"

    def record(self, entry: Entry, blob: bytes) -> Entry:
        """Write a block's weights (safetensors bytes), then its line. Returns the entry with its checksum.

        A block that stands already is left alone: its first entry stays.
        """
        if entry.block in self.entries:
            return self.entries[entry.block]
        load(blob)  # never record what cannot be read back
        entry = Entry(**{**asdict(entry), "sha256": hashlib.sha256(blob).hexdigest()})
        write_bytes(self.file(entry.block), blob)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")  # a crash left half a line
        try:
            with self._path.open("a") as stream:
                stream.write("\n" * torn + json.dumps(asdict(entry)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise DiskError(f"cannot write {self._path}: {error.strerror or error}") from error
        self.entries[entry.block] = entry
        return entry

    def weights(self, block: int) -> dict[str, Tensor]:
        """Return the state dict of a finished block, on the CPU."""
        return load_file(self.file(block))
