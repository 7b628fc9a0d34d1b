"""The best way to cut a row of blocks into contiguous ranges, each for a group of consecutive ranks. Numbers only: no
plans, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

FULL_SEARCH = (
    100_000_000  # ranks^2 * blocks^2 up to which ranks of differing speed are searched exactly: about a second
)
ROUNDING = 1e-12  # a limit that is met but for this share is met

Matrix = Any  # of floats; numpy's own types say little more


class Range(NamedTuple):
    """The blocks from `start` up to `end`, for the ranks from `first` up to `first + ranks`."""

    start: int
    end: int
    first: int
    ranks: int


@dataclass(frozen=True)
class RangeCosts:
    """Seconds of every range, as matrices [start, end].

    A group of g ranks computes for `divided` / g + (1 - 1 / g) * `shared`: what it divides among its rows, and what
    every share costs alike. Its gradients are on their way for (1 - 1 / g) * `moved` + (g - 1) * `hops`: what a ring
    all-reduce moves (Patarasuk, Yuan 2009), and the latency of that. Meanwhile everything else is computed: the range
    takes the computing, or its `heaviest` student's share of it and all averaging, whichever is longer, and no more
    than that. A range that is not allowed has infinite `divided`.
    """

    divided: Matrix
    shared: Matrix
    heaviest: Matrix
    moved: Matrix
    hops: Matrix

    def seconds(self, ranks: int) -> Matrix:
        """Return the seconds of every range on a group of so many ranks."""
        computing = self.divided / ranks + (1 - 1 / ranks) * self.shared
        averaging = self.heaviest / ranks + (1 - 1 / ranks) * self.moved + (ranks - 1) * self.hops
        return np.maximum(computing, averaging if ranks > 1 else 0.0)

    def fewest_ranks(self, limit_s: float, most: int) -> Matrix:
        """Return for every range the smallest group that does it within `limit_s`; infinite where none of up to `most`
        ranks does.

        Times g, the conditions are (limit - shared) g >= divided - shared for the computing, and for the averaging
        hops g^2 - (limit - moved + hops) g + (heaviest - moved) <= 0.
        """
        limit_s *= 1 + ROUNDING
        with np.errstate(invalid="ignore", divide="ignore"):
            computing = (self.divided - self.shared) / (limit_s - self.shared)
            computing = np.where(self.shared < limit_s, computing, np.inf)
            slope, surplus = limit_s - self.moved + self.hops, self.heaviest - self.moved
            # The smaller root in the form that loses no digits where hops are short, and holds without any (hops = 0).
            root = np.sqrt(slope**2 - 4 * self.hops * surplus)
            averaging = 2 * surplus / (slope + root)
            # From two ranks on: one averages nothing, and is seen to in the last line.
            found = np.maximum(2.0, np.ceil(np.maximum(computing, averaging) - 1e-9))
            seconds = np.maximum(
                self.divided / found + (1 - 1 / found) * self.shared,
                self.heaviest / found + (1 - 1 / found) * self.moved + (found - 1) * self.hops,
            )
            # Tried, as rounding up may go too far, and there may be no root: comparisons with NaN are false, which
            # makes it infinite.
            found = np.where((found <= most) & (seconds <= limit_s * (1 + 1e-9)), found, np.inf)
            return np.where(self.divided <= limit_s, 1.0, found)


def best_ranges(costs: RangeCosts, slowness: list[float], *, most: int) -> list[Range]:
    """Return the ranges, in order, whose slowest group is as fast as possible; no group has more than `most` ranks.

    Rank r takes `slowness[r]` times as long; a group is as slow as its slowest rank. Exact for equal ranks, by
    bisection over the makespan with a dynamic programme over blocks for each limit, and for few ranks that differ; many
    of those are planned as equals.
    """
    blocks = len(costs.divided) - 1
    if blocks == 0:
        return []
    if len(set(slowness)) > 1 and (len(slowness) * blocks) ** 2 <= FULL_SEARCH:
        return _every_group(costs, slowness, most)
    return _bisected(costs, len(slowness), most)


def _bisected(costs: RangeCosts, ranks: int, most: int) -> list[Range]:
    """Equal ranks: find the smallest limit for which the ranks suffice."""
    found = _within(costs, float(costs.seconds(1)[0, -1]), ranks, most)  # one rank for everything
    assert found is not None
    low, high = 0.0, _slowest(costs, found)
    while high - low > ROUNDING * high:
        middle = (low + high) / 2
        better = _within(costs, middle, ranks, most)
        if better is None:
            low = middle
        else:
            # What was found is often far below the limit it was asked for: that saves halvings.
            found, high = better, min(middle, _slowest(costs, better))
    return found


def _slowest(costs: RangeCosts, ranges: list[Range]) -> float:
    return max(float(costs.seconds(r.ranks)[r.start, r.end]) for r in ranges)


def _within(costs: RangeCosts, limit_s: float, ranks: int, most: int) -> list[Range] | None:
    """Return ranges that use the fewest ranks for which no group exceeds the limit; None where the ranks do not
    suffice."""
    needed = costs.fewest_ranks(limit_s, most)
    blocks = len(needed) - 1
    used, cut = np.full(blocks + 1, np.inf), np.zeros(blocks + 1, dtype=int)
    used[0] = 0
    for end in range(1, blocks + 1):
        total = used[:end] + needed[:end, end]
        cut[end] = total.argmin()
        used[end] = total[cut[end]]
    if used[-1] > ranks:
        return None
    bounds = [blocks]
    while bounds[-1]:
        bounds.append(int(cut[bounds[-1]]))
    bounds.reverse()
    return [Range(start, end, int(used[start]), int(used[end] - used[start])) for start, end in pairwise(bounds)]


def _every_group(costs: RangeCosts, slowness: list[float], most: int) -> list[Range]:
    """Ranks of differing speed: dynamic programming over (ranks used, blocks covered) and the size of the last group;
    a rank may stay idle. Among equals fewer ranks."""
    ranks, blocks = len(slowness), len(costs.divided) - 1
    best = np.full((ranks + 1, blocks + 1), np.inf)
    best[:, 0] = 0.0
    before = np.zeros((ranks + 1, blocks + 1, 2), dtype=int)  # size of the last group (0: the last rank is idle), cut
    every_size = [costs.seconds(size) for size in range(1, min(most, ranks) + 1)]
    for seconds in every_size:
        # No range without blocks: a rank that has none is idle, which is told apart below (size 0).
        seconds[np.tril_indices(blocks + 1)] = np.inf
    for used in range(1, ranks + 1):
        best[used] = best[used - 1]
        for size in range(1, min(most, used) + 1):
            slow = max(slowness[used - size : used])
            candidates = np.maximum(best[used - size][:, None], every_size[size - 1] * slow)
            cuts, found = candidates.argmin(axis=0), candidates.min(axis=0)
            better = found < best[used]
            best[used][better] = found[better]
            before[used][better] = np.stack([np.full(blocks + 1, size), cuts], axis=1)[better]
    ranges: list[Range] = []
    used, end = ranks, blocks
    while end:
        size, start = (int(value) for value in before[used, end])
        if size:
            ranges.append(Range(start, end, used - size, size))
            end, used = start, used - size
        else:
            used -= 1
    return ranges[::-1]
