"""Placing independent blocks on ranks so that the slowest rank is as fast as possible, and how near to the best there
is. No strategies, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.planning.costs import Span
from distill.planning.placement.improve import EFFORT, improve
from distill.planning.placement.lower_bound import LowerBound
from distill.planning.placement.packing import Packing
from distill.planning.placement.served_bound import served_bound

TOLERANCE = 1e-4  # a makespan this near to a bound, relatively, counts as optimal; costs are never known better
SEARCHED_BLOCKS = 9  # up to this many all placements are searched,
SEARCHED_PLACEMENTS = 50_000  # and where there are no more than this many
SEARCH_NODES = 20_000  # unless that takes more than this many nodes, a third of a second
BOUNDED_BLOCKS = 128  # up to this many the bound is raised by column generation

EXCESSES = (0.5, 0.75, 1, 2, 0.9, 0.6, 4, 8, 16, 32)  # makespans that are dived for: TOLERANCEs above the bound
POLISH = 3e6  # effort that goes into what a dive has found, about 40 ms

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
    """Return the best placement found, and a bound: the optimum itself for nearly all problems of up to 64 blocks.

    Small problems are searched whole. Of others the largest-first placement is improved by dividing pairs of ranks
    anew, the bound is raised by column generation, and where the two do not meet, dives into its programme look for
    placements just above the bound.
    Source: Graham 1969 for the largest-first rule (LPT).
    """
    packing = problem.packing
    if not packing.num_blocks:
        return _placement(problem, {}, max(problem.base))
    owner = largest_first(packing)
    if packing.bytes is None and _few(packing):
        rank_of, complete = _branch_and_bound(_by_block(problem, owner), problem)
        if complete:
            return _placement(problem, rank_of, max(problem.seconds(rank_of)))
    owner = improve(packing, owner, good_enough_s=packing.simple_bound() * (1 + TOLERANCE))
    owner, bound_s = _bounded(packing, owner)
    return _placement(problem, _by_block(problem, owner), bound_s)


def _few(packing: Packing) -> bool:
    """Whether all placements can be searched."""
    return packing.num_blocks <= SEARCHED_BLOCKS or packing.num_ranks**packing.num_blocks <= SEARCHED_PLACEMENTS


def _bounded(packing: Packing, owner: NDArray[np.intp]) -> tuple[NDArray[np.intp], float]:
    """Return a placement at least as good as `owner`, and a makespan that none beats."""
    bound_s = packing.simple_bound()
    if packing.num_blocks > BOUNDED_BLOCKS or _makespan(packing, owner) <= bound_s * (1 + TOLERANCE):
        return owner, bound_s
    if packing.sends and packing.teacher_ranks == 1:
        served_s, leaves = served_bound(packing, upper_s=_makespan(packing, owner), tolerance=TOLERANCE)
        bound_s = max(bound_s, served_s)
        owner = _better(packing, owner, _in_runs(packing, leaves), bound_s, effort=EFFORT)
        if _makespan(packing, owner) <= bound_s * (1 + TOLERANCE):
            return owner, bound_s
    bound = LowerBound(packing, owner, reached_s=bound_s, tolerance=TOLERANCE)
    bound.close_in()
    owner = _better(packing, owner, largest_first(packing, bound.likely()), bound.reached_s, effort=EFFORT)
    for excess in EXCESSES:
        best_s = _makespan(packing, owner)
        if bound.exhausted or best_s <= bound.reached_s * (1 + TOLERANCE):
            break
        found = bound.dive(min(bound.reached_s * (1 + excess * TOLERANCE), best_s / (1 + TOLERANCE / 4)))
        if found is not None:
            owner = _better(packing, owner, largest_first(packing, found), bound.reached_s, effort=POLISH)
    return owner, bound.reached_s


def _makespan(packing: Packing, owner: NDArray[np.intp]) -> float:
    return float(packing.seconds(owner).max())


def _better(
    packing: Packing, owner: NDArray[np.intp], start: NDArray[np.intp], bound_s: float, *, effort: float
) -> NDArray[np.intp]:
    """Return `owner`, or what can be made of another start if that is better."""
    good_enough_s = bound_s * (1 + TOLERANCE)
    if _makespan(packing, owner) <= good_enough_s:
        return owner
    other = improve(packing, start, good_enough_s=good_enough_s, effort=effort)
    return min(owner, other, key=lambda one: _makespan(packing, one))


def _in_runs(packing: Packing, leaves: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return a placement in which the other ranks share the blocks that leave rank 0 in runs of neighbours."""
    owner = np.zeros(packing.num_blocks, dtype=np.intp)
    speed = np.cumsum(1 / packing.slowness[1:])
    work = np.cumsum(packing.work_s[leaves])
    middle = (work - packing.work_s[leaves] / 2) / max(work[-1:].sum(), 1e-300) * speed[-1]
    owner[leaves] = 1 + np.searchsorted(speed, middle).clip(max=len(speed) - 1)
    return owner


def _placement(problem: Problem, rank_of: Mapping[int, int], bound_s: float) -> Placement:
    rank_s = tuple(map(float, problem.seconds(rank_of)))
    return Placement(rank_of, rank_s, min(float(bound_s), max(rank_s)))


def _by_block(problem: Problem, owner: NDArray[np.intp]) -> dict[int, int]:
    return {span.unit: int(rank) for span, rank in zip(problem.spans, owner, strict=True)}


def largest_first(packing: Packing, owner: NDArray[np.intp] | None = None) -> NDArray[np.intp]:
    """Return `owner` with every block that has none (-1) on the rank that is done with it first, large ones first."""
    owner = np.full(packing.num_blocks, -1) if owner is None else owner.copy()
    loads = packing.base_s.copy()
    placed = owner >= 0
    np.add.at(loads, owner[placed], packing.slowness[owner[placed]] * packing.work_s[placed])
    for block in np.argsort(-packing.work_s, kind="stable"):
        if owner[block] < 0:
            after = loads + packing.slowness * packing.work_s[block]
            owner[block] = int(after.argmin())
            loads[owner[block]] = after[owner[block]]
    return owner


def _branch_and_bound(incumbent: dict[int, int], problem: Problem) -> tuple[dict[int, int], bool]:
    """Return the best placement found within SEARCH_NODES, and whether all have been searched."""
    ordered = sorted(problem.spans, key=lambda span: (-problem.work(span, 0), span.unit))
    best, best_score, nodes = incumbent, problem.score(problem.shares(incumbent)), 0
    loads = list(problem.base)

    def descend(depth: int, placement: dict[int, int]) -> None:
        nonlocal best, best_score, nodes
        nodes += 1
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
