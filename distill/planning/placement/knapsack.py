"""Which blocks are worth most within a makespan: knapsacks in cells of time, for ranks of every kind. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distill.planning.placement.packing import Floats, Packing


@dataclass(frozen=True)
class Kind:
    """What ranks that are alike have in common."""

    slowness: float
    base_s: float
    wire: float  # seconds of the teacher ranks, together, for what is sent to it at price 1
    teaches: bool  # whether it is one of these where something is sent


class Knapsack:
    """The greatest worth of the blocks that a rank can do, by seconds of slowness 1 in `cells` of equal length.

    Where blocks are rounded down to whole cells (`rounding` 0, not 0.5), every set that fits is counted as fitting.
    """

    def __init__(self, packing: Packing, *, longest_s: float, cells: int, rounding: float) -> None:
        self._packing, self._cells, self._rounding = packing, cells, rounding
        self.cell_s = longest_s / cells
        self._work, self._reach = self._in_cells(packing.work_s), self._in_cells(packing.reach_s)

    def _in_cells(self, seconds: Floats) -> NDArray[np.intp]:
        return np.floor(seconds / self.cell_s + self._rounding + 1e-9).astype(np.intp)

    def size(self, blocks: Sequence[int]) -> int:
        """Return the cells that a rank with these blocks needs."""
        chosen = list(blocks)
        return int(self._work[chosen].sum() + self._reach[chosen].max(initial=0))

    def capacity(self, kind: Kind, makespan_s: float) -> int:
        """Return the cells that a rank has for its blocks."""
        return min(int(np.floor((makespan_s - kind.base_s) / kind.slowness / self.cell_s + 1e-6)), self._cells)

    def fill(self, worth: Floats, toll: float, kind: Kind) -> Filled:
        """Return the greatest worth at every capacity, less the toll for what teacher ranks spend on them."""
        packing = self._packing
        gain = worth - toll * (kind.wire * packing.wire_s + (packing.work_s if kind.teaches else 0.0))
        saved = toll * kind.wire * packing.shared_s
        if packing.reaches or saved.any():
            return self._fill_in_order(gain, saved)
        best = np.zeros(self._cells + 1)
        taken = np.zeros((len(worth), self._cells + 1), bool)
        for block, size in enumerate(self._work):
            if gain[block] > 0 and size <= self._cells:
                more = best[: len(best) - size] + gain[block]
                np.greater(more, best[size:], out=taken[block, size:])
                np.maximum(best[size:], more, out=best[size:])
        return _FilledFreely(best, taken, self._work, int((gain > 0).sum()))

    def _fill_in_order(self, gain: Floats, saved: Floats) -> _FilledInOrder:
        """The same where it matters which block was taken last: `having` are the worths with it."""
        cells = self._cells + 1
        without, having = np.zeros(cells), np.full(cells, -np.inf)
        best, last = np.zeros(cells), np.full(cells, -1)
        goes_on, came_from = np.zeros((2, len(gain), cells), bool)
        for block, size in enumerate(self._work):
            np.greater(having + saved[block], without, out=goes_on[block])
            np.greater(having, without, out=came_from[block])
            taken = np.maximum(having + saved[block], without) + gain[block]
            without = np.maximum(having, without)
            having = np.full(cells, -np.inf)
            having[size:] = taken[: max(0, cells - size)]
            reach = min(cells, int(self._reach[block]))
            reached = having[: cells - reach]
            last[reach:][reached > best[reach:]] = block
            np.maximum(best[reach:], reached, out=best[reach:])
        return _FilledInOrder(best, last, goes_on, came_from, self._work, self._reach)


class Filled(Protocol):
    """A knapsack's answers: the greatest worth at every capacity, and which blocks have it."""

    @property
    def best(self) -> Floats:
        """The greatest worth at every capacity (cells + 1), never falling."""

    @property
    def effort(self) -> int:
        """What filling it cost, in the unit of EFFORT."""

    def blocks(self, capacity: int) -> list[int]:
        """Return the blocks of the greatest worth at a capacity."""


@dataclass(frozen=True)
class _FilledFreely:
    best: Floats
    taken: NDArray[np.bool_]  # (blocks, cells + 1)
    work: NDArray[np.intp]
    effort: int  # blocks of any worth

    def blocks(self, capacity: int) -> list[int]:
        found = []
        for block in range(len(self.work) - 1, -1, -1):
            if self.taken[block, capacity]:
                found.append(block)
                capacity -= int(self.work[block])
        return found[::-1]


@dataclass(frozen=True)
class _FilledInOrder:
    best: Floats
    last: NDArray[np.intp]  # the last block of the best set
    goes_on: NDArray[np.bool_]  # where a block is taken: whether the one before it is, too
    came_from: NDArray[np.bool_]  # where a block is left out: whether the one before it is taken
    work: NDArray[np.intp]
    reach: NDArray[np.intp]

    @property
    def effort(self) -> int:
        return 3 * len(self.work)

    def blocks(self, capacity: int) -> list[int]:
        found: list[int] = []
        last = int(self.last[capacity])
        if last < 0:
            return found
        cell, taken = capacity - int(self.reach[last]), True
        for block in range(last, -1, -1):
            if taken:
                found.append(block)
                cell -= int(self.work[block])
                taken = bool(self.goes_on[block, cell])
            else:
                taken = bool(self.came_from[block, cell])
        return found[::-1]
