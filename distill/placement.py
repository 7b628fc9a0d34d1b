"""Placing independent blocks on ranks so that the slowest rank is as fast as possible. No strategies, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distill.plan import Span

SEARCH_NODES = 100_000  # branch and bound gives up its proof after this many nodes: about half a second

Share = tuple[float, float]  # seconds of a rank's own work, and seconds that serving it costs rank 0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Blocks to be placed and what a placement costs, by whatever rule a strategy has.

    `work(span, rank)` is a lower bound of what a span adds to the rank it is on; `share(spans, rank)` what a rank with
    these spans costs, `loads(shares)` the seconds of every rank; `base` their seconds before anything is placed, and
    ranks with the same `kind` are alike as long as they are empty.
    """

    spans: Sequence[Span]
    world_size: int
    work: Callable[[Span, int], float]
    share: Callable[[Sequence[Span], int], Share]
    loads: Callable[[Sequence[Share]], list[float]]
    base: Sequence[float]
    kind: Sequence[object]

    def shares(self, placement: Mapping[int, int]) -> list[Share]:
        return [
            self.share([s for s in self.spans if placement[s.block] == rank], rank) for rank in range(self.world_size)
        ]

    def seconds(self, placement: Mapping[int, int]) -> list[float]:
        """Return every rank's seconds under a placement (block -> rank)."""
        return self.loads(self.shares(placement))

    def score(self, shares: Sequence[Share]) -> tuple[float, float]:
        loads = self.loads(shares)
        return max(loads), sum(loads)  # among equal makespans the one with less work and traffic


def place(problem: Problem) -> dict[int, int]:
    """Return the rank of every block: exact by branch and bound for small problems, otherwise largest-first placement
    improved by moves and swaps.

    Source: Graham 1969 for the largest-first rule (LPT).
    """
    placement = _improve(largest_first(problem), problem)
    return _branch_and_bound(placement, problem)


def _ordered(problem: Problem) -> list[Span]:
    return sorted(problem.spans, key=lambda span: (-problem.work(span, 0), span.block))


def largest_first(problem: Problem) -> dict[int, int]:
    """Return the placement of the largest blocks first, each on the rank that is then the least loaded."""
    loads = list(problem.base)
    placement = {}
    for span in _ordered(problem):
        rank = min(range(problem.world_size), key=lambda rank: loads[rank] + problem.work(span, rank))
        placement[span.block] = rank
        loads[rank] += problem.work(span, rank)
    return placement


def _improve(placement: dict[int, int], problem: Problem) -> dict[int, int]:
    """Apply moves of one block and swaps of two that help until none does. Only the ranks that a change touches are
    counted anew: with a hundred blocks everything else takes minutes."""
    shares = problem.shares(placement)
    best = problem.score(shares)
    improved = True
    while improved:
        improved = False
        ranks = range(problem.world_size)
        moves = [{block: rank} for block in placement for rank in ranks if placement[block] != rank]
        swaps = [{a: placement[b], b: placement[a]} for a in placement for b in placement if a < b]
        for change in moves + swaps:
            candidate, changed = placement | change, list(shares)
            for rank in {*change.values(), *(placement[block] for block in change)}:
                changed[rank] = problem.share([s for s in problem.spans if candidate[s.block] == rank], rank)
            score = problem.score(changed)
            if score < best:
                placement, shares, best, improved = candidate, changed, score, True
    return placement


def _branch_and_bound(incumbent: dict[int, int], problem: Problem) -> dict[int, int]:
    """Return the optimal placement, or the best one found within SEARCH_NODES."""
    ordered = _ordered(problem)
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
            if loads[rank] == problem.base[rank]:  # empty ranks of a kind are alike: one of them stands for all
                if problem.kind[rank] in tried:
                    continue
                tried.add(problem.kind[rank])
            before = loads[rank]
            loads[rank] += problem.work(ordered[depth], rank)
            placement[ordered[depth].block] = rank
            descend(depth + 1, placement)
            loads[rank] = before
        placement.pop(ordered[depth].block, None)

    descend(0, {})
    return best
