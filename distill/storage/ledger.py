"""Rank 0's durable record of finished units: blocks/NN.safetensors and one line each in ledger.jsonl."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from distill.storage.files import (
    DamagedFileError,
    append_json,
    json_line,
    read_bytes,
    read_lines,
    write_bytes,
    write_text,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One finished unit. `status` is "finished", or "diverged" when its loss became NaN or infinite at step
    `diverged_at` and the last finite weights were kept. Relative errors have no unit; seconds are of training alone.
    `unit` is its number, `block` the first block that it stands for. `origin` says what it was trained from; it is the
    ledger's. `source` is the run that trained it, where it was taken from another one."""

    unit: int
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
    origin: str = ""
    source: str | None = None


class Ledger:
    """The finished units of one run directory. Only rank 0 writes it."""

    def __init__(self, run_dir: Path, *, origin: str = "") -> None:
        """Read what is there; what is damaged, or was trained from something else than `origin`, is not believed."""
        self._path = run_dir / "ledger.jsonl"
        self._run_dir = run_dir
        self._origin = origin
        self._untidy = False  # lines that are not believed stand in the file
        self.entries: dict[int, Entry] = {}
        for line in read_lines(self._path):
            if isinstance(line, DamagedFileError):
                self._doubt(f"{line}; its block is trained again", line.path)
            else:
                self._take(line)
        for entry in list(self.entries.values()):
            self._check(entry)

    def _take(self, line: dict[str, Any]) -> None:
        try:
            entry = Entry(**{"unit": line.get("block"), **line})  # earlier versions knew blocks alone
        except TypeError as error:
            self._doubt(f"a line is of another version and its block is trained again ({error})", self._path)
            return
        self.entries[entry.unit] = entry  # of two the later: its unit had to be trained again

    def _check(self, entry: Entry) -> None:
        """Forget a unit that was trained from something else, or whose file has not the recorded checksum."""
        if entry.origin != self._origin:
            self._doubt(f"block {entry.unit:02d} was trained in another run or from another teacher", self._path)
            del self.entries[entry.unit]
            return
        try:
            self.content(entry)
        except DamagedFileError as damage:
            self._doubt(f"{damage}; the block is trained again", damage.path)
            del self.entries[entry.unit]

    def _doubt(self, why: str, path: Path) -> None:
        """Say what is not believed. Raises DamagedFileError where nothing can be written in its place."""
        if path.is_dir():
            raise DamagedFileError(path, "a folder is in its place; remove it")
        self._untidy = True
        log.warning("ledger: %s", why)

    def file(self, unit: int) -> Path:
        return self._run_dir / unit_file(unit)

    @property
    def files(self) -> list[str]:
        """The names of everything that holds it, within the run directory."""
        return [self._path.name, *map(unit_file, sorted(self.entries))]

    def record(self, entry: Entry, blob: bytes) -> Entry:
        """Write a unit's weights (safetensors bytes), then its line. Returns the entry with its checksum.

        A unit that stands already is left alone: its first entry stays.
        """
        if entry.unit in self.entries:
            return self.entries[entry.unit]
        load(blob)  # never record what cannot be read back
        entry = replace(entry, sha256=hashlib.sha256(blob).hexdigest(), origin=self._origin)
        write_bytes(self.file(entry.unit), blob)
        # written anew as a whole: lines that are not believed would be complained of at every start
        if self._untidy:
            believed = [*self.entries.values(), entry]
            write_text(self._path, "".join(json_line(asdict(one), self._path.name) for one in believed))
            self._untidy = False
        else:
            append_json(self._path, asdict(entry))
        self.entries[entry.unit] = entry
        return entry

    def weights(self, unit: int) -> dict[str, Tensor]:
        """Return the state dict of a finished unit, on the CPU. Raises DamagedFileError."""
        return load(self.content(self.entries[unit]))

    def content(self, entry: Entry) -> bytes:
        """Return a unit's file, as it was recorded. Raises DamagedFileError."""
        path = self.file(entry.unit)
        content = read_bytes(path)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise DamagedFileError(path, "damaged: it is not the file that the ledger has recorded")
        return content


def unit_file(unit: int) -> str:
    """Return the name of a unit's file within the run directory."""
    return f"blocks/{unit:02d}.safetensors"
