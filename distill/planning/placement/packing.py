"""Blocks on ranks as arrays: what a placement costs where blocks depend on each other only through a rank's teacher and
the boundaries sent to it. Exact for blocks with equal steps, otherwise never more than it really costs. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Chosen = NDArray[np.intp] | slice


@dataclass(frozen=True, kw_only=True)
class Packing:
    """N blocks in the order of the network, on W ranks.

    A rank takes `slowness` times the work of its blocks and the longest `reach_s` among them (its own teacher). Serving
    it costs `wire_s` of every block on it, less `shared_s[j]` where blocks j - 1 and j of the order are both there,
    times the rank's `price`; the first `teacher_ranks` ranks share that equally, and what is for one of them costs it
    nothing. All ranks begin with `base_s`.
    """

    work_s: Floats  # (N)
    reach_s: Floats  # (N)
    wire_s: Floats  # (N)
    shared_s: Floats  # (N), the first is 0
    slowness: Floats  # (W)
    base_s: Floats  # (W)
    price: Floats  # (W)
    teacher_ranks: int = 1
    bytes: Floats | None = None  # (N) of a block's memory, where that is limited
    room: Floats | None = None  # (W) bytes that a rank has for blocks

    @property
    def num_blocks(self) -> int:
        return len(self.work_s)

    @property
    def num_ranks(self) -> int:
        return len(self.slowness)

    @cached_property
    def reaches(self) -> bool:
        return bool(self.reach_s.any())

    @cached_property
    def sends(self) -> bool:
        return bool(self.wire_s.any() and self.price.any())

    def own_s(self, chosen: Floats, blocks: Chosen = slice(None)) -> Floats:
        """Return the seconds of a rank of slowness 1 with each row's blocks; `chosen` (rows, blocks) is 0 or 1."""
        own: Floats = chosen @ self.work_s[blocks]
        if self.reaches and chosen.shape[1]:
            own = own + (chosen * self.reach_s[blocks]).max(axis=1)
        return own

    def excess_s(self, rank: int, chosen: Floats, blocks: Chosen = slice(None)) -> Floats:
        """Return a penalty for each row's blocks on `rank`: nothing where they fit in its memory, otherwise more than
        any placement that fits can take."""
        if self.bytes is None or self.room is None:
            return np.zeros(len(chosen))
        over = np.maximum(0.0, chosen @ self.bytes[blocks] - self.room[rank]) / self.bytes.sum()
        worst = self.base_s.sum() + self.slowness.max() * (self.work_s + self.reach_s).sum()
        # A step, so that what fits always wins, and a slope, so that the search finds its way out where nothing fits
        # yet.
        penalty: Floats = worst * ((over > 0) + over)
        return penalty

    def sent_s(self, chosen: Floats, blocks: Chosen = slice(None)) -> Floats:
        """Return what it costs, at price 1, to send each row's blocks their boundaries."""
        where = np.arange(self.num_blocks)[blocks]
        # `blocks` may have gaps. What lies there is on other ranks, so that those on either side share nothing.
        shared = np.where(np.diff(where) == 1, self.shared_s[where[1:]], 0.0)
        sent: Floats = chosen @ self.wire_s[where] - (chosen[:, 1:] * chosen[:, :-1]) @ shared
        return sent

    def seconds(self, owner: NDArray[np.intp]) -> Floats:
        """Return every rank's seconds; `owner` (N) is the rank of every block."""
        chosen = (owner[None, :] == np.arange(self.num_ranks)[:, None]).astype(float)
        loads: Floats = self.base_s + self.slowness * self.own_s(chosen)
        if self.bytes is not None:
            loads += [self.excess_s(rank, chosen[rank : rank + 1])[0] for rank in range(self.num_ranks)]
        if self.sends:
            sent = self.price * self.sent_s(chosen)
            teachers = slice(self.teacher_ranks)
            loads[teachers] += self.slowness[teachers] * (sent.sum() - sent[teachers]) / self.teacher_ranks
        return loads

    def simple_bound(self) -> float:
        """Return a makespan that no placement can beat: all work spread evenly, or one block on its best rank."""
        alone = self.base_s[:, None] + self.slowness[:, None] * (self.work_s + self.reach_s)
        largest = float(alone.min(axis=0).max(initial=0.0))
        order = np.argsort(self.base_s, kind="stable")
        base, speed = self.base_s[order], 1 / self.slowness[order]
        level = (self.work_s.sum() + np.cumsum(base * speed)) / np.cumsum(speed)  # with the k least loaded ranks
        bound_s = max(float(level.min()), largest, float(self.base_s.max()))
        return max(bound_s, self._reach_bound(bound_s)) if self.reaches else bound_s

    def _reach_bound(self, low_s: float) -> float:
        """Return a makespan that no placement can beat, `low_s` or longer, where every rank pays its longest reach.

        Were blocks divisible, the fastest rank would best do the blocks of the longest reach, as many as it can, the
        next one those that follow, and so on: any other order leaves more reach to be paid.
        """
        order = np.argsort(-self.reach_s, kind="stable")
        done_s, reach_s = np.cumsum(self.work_s[order]), self.reach_s[order]

        def possible(makespan_s: float) -> bool:
            total = 0.0
            for room_s in np.sort((makespan_s - self.base_s) / self.slowness)[::-1]:
                first = int(np.searchsorted(done_s, total * (1 + 1e-12), side="right"))
                if first == len(order):
                    break
                total += max(0.0, room_s - reach_s[first])
            return total >= float(done_s[-1]) * (1 - 1e-12)

        high_s = low_s
        while not possible(high_s):
            high_s *= 2
        # The lower end is returned and not the middle: a bound may be too low, but never too high.
        for _ in range(40 if high_s > low_s else 0):
            middle_s = (low_s + high_s) / 2
            low_s, high_s = (low_s, middle_s) if possible(middle_s) else (middle_s, high_s)
        return low_s
