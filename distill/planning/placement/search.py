"""Placing independent blocks on ranks so that the slowest rank is as fast as possible, and how near to the best there
is. No strategies, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.planning.costs import Span
from distill.planning.placement.assignment import shorter
from distill.planning.placement.improve import improve
from distill.planning.placement.packing import Packing

TOLERANCE = 5e-3  # a makespan this near to a bound, relatively, counts as optimal: costs are known to some per cent
NEARLY = 1e-4  # to a bound, where the search for better placements ends
SEARCHED_BLOCKS = 9  # up to this many all placements are searched,
SEARCHED_PLACEMENTS = 50_000  # and where there are no more than this many
SEARCH_NODES = 20_000  # unless that takes more than this many nodes, a third of a second
POLISH = 3e6  # effort that goes into what the programme has found, about 40 ms

Share = tuple[float, float]  # seconds of a rank's own work, and seconds that serving it costs rank 0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Blocks to be placed and what a placement costs, by whatever rule a strategy has.

    `work(span, rank)` is a lower bound of what a span adds to the rank it is on; `share(spans, rank)` what a rank with
    these spans costs, `loads(shares)` the seconds of every rank; `base` their seconds before anything is placed, and
    ranks with the same `kind` are alike as long as they are empty. `packing` has the same costs as arrays, or lower
    ones, the blocks in the order of `spans`.
    """

    spans: Sequence[Span]
    world_size: int
    work: Callable[[Span, int], float]
    share: Callable[[Sequence[Span], int], Share]
    loads: Callable[[Sequence[Share]], list[float]]
    base: Sequence[float]
    kind: Sequence[object]
    packing: Packing

    def shares(self, placement: Mapping[int, int]) -> list[Share]:
        return [
            self.share([s for s in self.spans if placement[s.unit] == rank], rank) for rank in range(self.world_size)
        ]

    def seconds(self, placement: Mapping[int, int]) -> list[float]:
        """Return every rank's seconds under a placement (block -> rank)."""
        return self.loads(self.shares(placement))

    def score(self, shares: Sequence[Share]) -> tuple[float, float]:
        loads = self.loads(shares)
        return max(loads), sum(loads)  # among equal makespans the one with less work and traffic


@dataclass(frozen=True)
class Placement:
    """The rank of every block, every rank's seconds, and a makespan that no placement beats."""

    rank_of: Mapping[int, int]
    rank_s: tuple[float, ...]
    bound_s: float

    @property
    def gap(self) -> float:
        """By how much the makespan may exceed the least possible one, relatively; 0 if by TOLERANCE or less."""
        gap = max(self.rank_s) / self.bound_s - 1 if self.bound_s else 0.0
        return gap if gap > TOLERANCE else 0.0


def place(problem: Problem) -> Placement:
    """Return the best placement found, and a bound that is mostly within TOLERANCE of it for up to PAIRS pairs of block
    and rank.

    Small problems are searched whole. Of others the largest-first placement is improved by dividing pairs of ranks
    anew; where that is not within TOLERANCE of a simple bound, one mixed-integer programme looks for a shorter one, and
    tells a bound.
    Source: Graham 1969 for the largest-first rule (LPT).
    """
    packing = problem.packing
    if not packing.num_blocks:
        return _placement(problem, {}, max(problem.base))
    owner = largest_first(packing)
    # The whole search counts with loads(), which know nothing of memory.
    if packing.bytes is None and _few(packing):
        rank_of, complete = _branch_and_bound(_by_block(problem, owner), problem)
        if complete:
            return _placement(problem, rank_of, max(problem.seconds(rank_of)))
    owner, bound_s = _bounded(packing, owner)
    return _placement(problem, _by_block(problem, owner), bound_s)


def _few(packing: Packing) -> bool:
    """Whether all placements can be searched."""
    return packing.num_blocks <= SEARCHED_BLOCKS or packing.num_ranks**packing.num_blocks <= SEARCHED_PLACEMENTS


def _bounded(packing: Packing, owner: NDArray[np.intp]) -> tuple[NDArray[np.intp], float]:
    """Return what can be made of `owner`, and a makespan that no placement beats."""
    bound_s = packing.simple_bound()
    owner = improve(packing, owner, good_enough_s=bound_s * (1 + NEARLY))
    best_s = _makespan(packing, owner)
    if best_s <= bound_s * (1 + TOLERANCE):
        return owner, bound_s
    limit_s = best_s / (1 + TOLERANCE / 2)  # less is not worth a search
    found, bound_s = shorter(packing, limit_s, reached_s=bound_s, tolerance=0.4 * TOLERANCE)
    if found is not None:
        found = improve(packing, found, good_enough_s=bound_s * (1 + NEARLY), effort=POLISH)
        owner = min(owner, found, key=lambda one: _makespan(packing, one))
    return owner, bound_s


def _makespan(packing: Packing, owner: NDArray[np.intp]) -> float:
    return float(packing.seconds(owner).max())


def _placement(problem: Problem, rank_of: Mapping[int, int], bound_s: float) -> Placement:
    rank_s = tuple(map(float, problem.seconds(rank_of)))
    # The packing's seconds, and so a bound, may hold rounding, and penalties where nothing fits, which these do not.
    return Placement(rank_of, rank_s, min(float(bound_s), max(rank_s)))


def _by_block(problem: Problem, owner: NDArray[np.intp]) -> dict[int, int]:
    return {span.unit: int(rank) for span, rank in zip(problem.spans, owner, strict=True)}


def largest_first(packing: Packing) -> NDArray[np.intp]:
    """Return a placement (N: the rank of every block): each, the largest first, is on the rank that is done with it
    first among those that have room for it, or, where none has, on the one with most."""
    owner = np.empty(packing.num_blocks, dtype=np.intp)
    loads = packing.base_s.copy()
    room = np.full(packing.num_ranks, np.inf) if packing.room is None else packing.room.copy()
    sizes = np.zeros(packing.num_blocks) if packing.bytes is None else packing.bytes
    for block in np.argsort(-packing.work_s, kind="stable"):
        after = loads + packing.slowness * packing.work_s[block]
        fits = room >= min(sizes[block], room.max())
        rank = int(np.where(fits, after, np.inf).argmin())
        owner[block], loads[rank] = rank, after[rank]
        room[rank] -= sizes[block]
    return owner


def _branch_and_bound(incumbent: dict[int, int], problem: Problem) -> tuple[dict[int, int], bool]:
    """Return the best placement found within SEARCH_NODES, and whether all have been searched."""
    # The largest first: loads grow soonest, and most branches are cut off near the root.
    ordered = sorted(problem.spans, key=lambda span: (-problem.work(span, 0), span.unit))
    best, best_score, nodes = incumbent, problem.score(problem.shares(incumbent)), 0
    loads = list(problem.base)

    def descend(depth: int, placement: dict[int, int]) -> None:
        nonlocal best, best_score, nodes
        nodes += 1
        # An equal makespan is not cut off: it may have less work and traffic (see score).
        if nodes > SEARCH_NODES or max(loads) > best_score[0]:
            return
        if depth == len(ordered):
            nodes += len(ordered)  # a full count costs about as much as that many nodes
            score = problem.score(problem.shares(placement))
            if score < best_score:
                best, best_score = dict(placement), score
            return
        tried: set[object] = set()
        for rank in sorted(range(problem.world_size), key=loads.__getitem__):
            if rank not in placement.values():  # empty ranks of a kind are alike: one of them stands for all
                if problem.kind[rank] in tried:
                    continue
                tried.add(problem.kind[rank])
            before = loads[rank]
            loads[rank] += problem.work(ordered[depth], rank)
            placement[ordered[depth].unit] = rank
            descend(depth + 1, placement)
            loads[rank] = before
            del placement[ordered[depth].unit]

    descend(0, {})
    return best, nodes <= SEARCH_NODES
