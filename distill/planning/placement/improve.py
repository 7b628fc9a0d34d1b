"""Improving a placement by dividing the blocks of two ranks anew, in the best of all ways at once. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from distill.planning.placement.packing import Floats, Packing

FREE = 11  # blocks of two ranks that are divided anew at a time: 2048 ways
EFFORT = 3e7  # numbers looked at, up to 0.4 s; not a time limit, so that the same problem gives the same plan
SHUFFLED = 8  # blocks that lose their place at once where no pair of ranks can do better
CALL = 4096  # what one look costs besides, in the same unit
DOUBLINGS = 5  # loads are summed to the 32nd power: nearly their maximum, but every rank counts


def improve(
    packing: Packing, owner: NDArray[np.intp], *, good_enough_s: float, effort: float = EFFORT
) -> NDArray[np.intp]:
    """Return the best placement found from `owner` (N: the rank of every block), at most `effort` away.

    Pairs of ranks are divided anew until none gets better; then the slowest and some others are shuffled, again and
    again, until the makespan is `good_enough_s`.
    """
    search = _Search(packing, owner.copy(), effort)
    while not search.exhausted:
        search.descend()
        if search.best_s <= good_enough_s or packing.num_ranks == 1:
            break
        if packing.num_ranks == 2 and packing.num_blocks <= FREE:
            break  # all ways have been looked at
        search.shuffle()
    return search.best


class _Search:
    def __init__(self, packing: Packing, owner: NDArray[np.intp], effort: float) -> None:
        self._packing, self._owner = packing, owner
        # Always the same numbers, so that the same problem gives the same plan.
        self._random = np.random.default_rng(0)
        self._loads = packing.seconds(owner)
        self.best, self.best_s = owner.copy(), float(self._loads.max())
        # Loads are compared by their 32nd powers: as shares of the first makespan they neither overflow nor vanish.
        self._scale = self.best_s or 1.0
        self._effort = effort

    @property
    def exhausted(self) -> bool:
        return self._effort <= 0

    def descend(self) -> None:
        """Divide pairs of ranks anew until no pair that has changed gets better."""
        fresh = set(range(self._packing.num_ranks))
        while fresh and not self.exhausted:
            changed: set[int] = set()
            for a, b in combinations(range(self._packing.num_ranks), 2):
                if ({a, b} & (fresh | changed)) and not self.exhausted and self._divide(a, b):
                    changed |= {a, b}
            fresh = changed
            self._loads = self._packing.seconds(self._owner)  # sums of many changes drift
            if float(self._loads.max()) < self.best_s:
                self.best, self.best_s = self._owner.copy(), float(self._loads.max())

    def shuffle(self) -> None:
        """Give some blocks of the slowest rank and of up to three others to any of them."""
        self._owner = self.best.copy()
        ranks = self._packing.num_ranks
        slowest = int(self._packing.seconds(self._owner).argmax())
        some = sorted({slowest, *map(int, self._random.choice(ranks, min(ranks, 3), replace=False))})
        blocks = np.flatnonzero(np.isin(self._owner, some))
        blocks = self._random.choice(blocks, min(len(blocks), SHUFFLED), replace=False)
        self._owner[blocks] = self._random.choice(some, len(blocks))
        self._loads = self._packing.seconds(self._owner)

    def _divide(self, a: int, b: int) -> bool:
        """Divide the blocks of ranks a < b in the best way; return whether that helped."""
        packing, loads = self._packing, self._loads
        blocks = np.flatnonzero((self._owner == a) | (self._owner == b))
        if not len(blocks):
            return False
        free = blocks
        if len(blocks) > FREE:  # any others stay where they are
            free = np.sort(self._random.choice(blocks, FREE, replace=False))
        if not packing.sends and not packing.reaches and packing.bytes is None:
            blocks = free  # the others have no part in what changes
        before = (self._owner[blocks] == a).astype(float)[None, :]
        ways = np.repeat(before, 2 ** len(free), axis=0)
        ways[:, np.isin(blocks, free)] = _subsets(len(free))
        self._effort -= CALL + ways.size * (3 if packing.sends else 1)
        seconds = {
            a: loads[a] + self._added(a, blocks, ways, before),
            b: loads[b] + self._added(b, blocks, 1 - ways, 1 - before),
        }
        if packing.sends:
            self._add_sending(
                seconds, {a: self._sent(a, blocks, ways, before), b: self._sent(b, blocks, 1 - ways, 1 - before)}
            )
        worth = np.sum([self._weighed(values) for values in seconds.values()], axis=0)
        best = int(np.argmin(worth))
        # What rounding alone makes better is no gain: ranks would hand the same blocks to and fro.
        if worth[best] >= self._weighed(loads[list(seconds)]).sum() * (1 - 1e-12):
            return False
        self._owner[blocks] = np.where(ways[best] > 0, a, b)
        for rank, values in seconds.items():
            loads[rank] = values[best]
        return True

    def _added(self, rank: int, blocks: NDArray[np.intp], ways: Floats, before: Floats) -> Floats:
        packing = self._packing
        added: Floats = packing.slowness[rank] * (packing.own_s(ways, blocks) - packing.own_s(before, blocks))
        if packing.bytes is None:
            return added
        return added + packing.excess_s(rank, ways, blocks) - packing.excess_s(rank, before, blocks)

    def _sent(self, rank: int, blocks: NDArray[np.intp], ways: Floats, before: Floats) -> Floats:
        packing = self._packing
        more: Floats = packing.price[rank] * (packing.sent_s(ways, blocks) - packing.sent_s(before, blocks))
        return more

    def _add_sending(self, seconds: dict[int, Floats], more: Mapping[int, Floats]) -> None:
        """Add to the seconds of the ranks what more is sent to each of them, to those who send it."""
        packing = self._packing
        for teacher in range(packing.teacher_ranks):
            sent = sum(values for rank, values in more.items() if rank != teacher)
            share = packing.slowness[teacher] / packing.teacher_ranks
            seconds[teacher] = seconds.get(teacher, self._loads[teacher]) + share * sent

    def _weighed(self, seconds: Floats) -> Floats:
        weighed = seconds / self._scale
        for _ in range(DOUBLINGS):
            weighed = weighed * weighed
        return weighed


@cache
def _subsets(count: int) -> Floats:
    """Return all subsets of `count` things as rows of 0 and 1."""
    return ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(float)
