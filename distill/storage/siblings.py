"""What the runs under one outputs/ have of one another's work: every run notes the identities of its stages and blocks,
and another that would compute the same finds it by them. Knows no configuration objects and no torch.

Each run writes in its own directory alone, so that several may work, and be removed, at the same time. What is noted is
no promise that it is finished or whole: whoever takes it looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.storage.files import read_json, write_json

NOTE = "stage_identities.json"


class Siblings:
    """The other runs of all experiments that have the tag of `run`, an outputs/<experiment>/<run>. Those with another
    one are there to be measured against it."""

    def __init__(self, run: Path, *, tag: str | None) -> None:
        self._run, self._tag = run, tag
        self._root = run.parent.parent

    def name_of(self, run: Path) -> str:
        """Return how a run is spoken of: <experiment>/<run>."""
        return run.relative_to(self._root).as_posix()

    def note(self, **facts: str | Mapping[str, str]) -> None:
        """Note what this run's `teacher`, its `candidates` and its `blocks` (by number) are, or some of them."""
        write_json(self._run / NOTE, _noted(self._run) | {"tag": self._tag} | facts)

    def with_same(self, what: str, identity: str) -> Iterator[Path]:
        """Yield the other runs that have noted the same `teacher`, or `candidates`."""
        yield from (run for run, noted in self._others() if noted.get(what) == identity)

    def with_blocks(self) -> Iterator[tuple[Path, dict[str, int]]]:
        """Yield the other runs that have noted blocks, with the index of each block by its identity."""
        for run, noted in self._others():
            if isinstance(blocks := noted.get("blocks"), dict):
                yield run, {str(identity): int(block) for block, identity in blocks.items()}

    def _others(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for note in sorted(self._root.glob(f"*/*/{NOTE}")):
            if note.parent != self._run and (noted := _noted(note.parent)) and noted.get("tag") == self._tag:
                yield note.parent, noted


def _noted(run: Path) -> dict[str, Any]:
    """What a run has noted; nothing where that is not there, is gone, or cannot be read."""
    try:
        noted = read_json(run / NOTE)
    except (OSError, ValueError, DistillError):
        return {}
    return noted if isinstance(noted, dict) else {}
