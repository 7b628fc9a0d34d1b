"""Costs of blocks -> a plan: which rank trains which student blocks, and how long that should take. No torch here.

Words and arithmetic are those of docs/architecture.md: T_k teacher forward seconds of block k, S_k seconds of one
student step, b_k bytes of boundary k (the input of block k and the target of block k - 1).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

SEARCH_NODES = 100_000  # branch and bound gives up its proof after this many nodes: about half a second


@dataclass(frozen=True)
class Costs:
    """Per-batch costs. `teacher_s[k]` and `student_s[k]` in seconds, `boundary_bytes` has one entry more than blocks.

    A byte on the wire costs the sending rank `wire_s_per_byte` seconds; a receiver takes it beside its training.
    """

    teacher_s: tuple[float, ...]
    student_s: tuple[float, ...]
    boundary_bytes: tuple[int, ...]
    wire_s_per_byte: float = 0.0


@dataclass(frozen=True)
class Span:
    """The steps that block `block` has still to do: `first` to `budget` - 1."""

    block: int
    first: int
    budget: int

    @property
    def steps(self) -> int:
        return self.budget - self.first


@dataclass(frozen=True)
class Plan:
    """Which rank owns which blocks (`owners[rank]`), from which step on (`spans`), and the prediction."""

    strategy: str
    owners: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]
    predicted_makespan_s: float
    predicted_rank_s: tuple[float, ...]

    @property
    def world_size(self) -> int:
        return len(self.owners)

    def spans_of(self, rank: int) -> tuple[Span, ...]:
        """The spans of the blocks that `rank` owns, in block order."""
        return tuple(span for span in self.spans if span.block in self.owners[rank])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        raw = json.loads(text)
        return Plan(
            strategy=raw["strategy"],
            owners=tuple(tuple(blocks) for blocks in raw["owners"]),
            spans=tuple(Span(**span) for span in raw["spans"]),
            predicted_makespan_s=raw["predicted_makespan_s"],
            predicted_rank_s=tuple(raw["predicted_rank_s"]),
        )


def boundaries_of(blocks: Iterable[int]) -> frozenset[int]:
    """Return the boundaries that training these blocks needs: each block's input and target, shared ones once."""
    return frozenset(boundary for block in blocks for boundary in (block, block + 1))


def plan_broadcast(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Place the blocks so that the slowest rank is as fast as possible; rank 0 also pays for the teacher and the sends.

    Exact by branch and bound for small problems, otherwise largest-first placement improved by moves and swaps.
    Source: Graham 1969 for the largest-first rule (LPT).
    """
    ordered = sorted(spans, key=lambda span: (-costs.student_s[span.block] * span.steps, span.block))
    placement = _improve(_largest_first(costs, ordered, world_size), costs, spans, world_size)
    placement = _branch_and_bound(placement, costs, ordered, world_size)
    loads = rank_seconds(placement, costs, spans, world_size)
    owners = tuple(tuple(sorted(b for b, r in placement.items() if r == rank)) for rank in range(world_size))
    return Plan("broadcast", owners, tuple(sorted(spans, key=lambda s: s.block)), max(loads), tuple(loads))


def teacher_seconds(costs: Costs, spans: Iterable[Span]) -> float:
    """Seconds of teacher forward passes: each batch once, only as deep as the deepest block that still trains on it."""
    remaining = sorted((span for span in spans if span.steps > 0), key=lambda span: span.first)
    edges = sorted({edge for span in remaining for edge in (span.first, span.budget)})
    total = 0.0
    for low, high in pairwise(edges):
        deepest = max((span.block for span in remaining if span.first <= low < span.budget), default=-1)
        total += (high - low) * sum(costs.teacher_s[: deepest + 1])
    return total


def rank_seconds(placement: Mapping[int, int], costs: Costs, spans: Sequence[Span], world_size: int) -> list[float]:
    """Busy seconds of every rank: its students, and rank 0's teacher and sends."""
    shares = [_share(costs, [s for s in spans if placement[s.block] == rank]) for rank in range(world_size)]
    return _loads(teacher_seconds(costs, spans), shares)


def _share(costs: Costs, owned: Sequence[Span]) -> tuple[float, float]:
    """Seconds that one rank's students take, and seconds that sending their boundaries costs rank 0."""
    size = sum(costs.boundary_bytes[boundary] for boundary in boundaries_of(span.block for span in owned))
    wire = max((span.steps for span in owned), default=0) * size * costs.wire_s_per_byte
    return sum(costs.student_s[span.block] * span.steps for span in owned), wire


def _loads(teacher_s: float, shares: Sequence[tuple[float, float]]) -> list[float]:
    (own, _), *others = shares  # rank 0's own boundaries do not travel
    return [teacher_s + own + sum(wire for _, wire in others), *(students for students, _ in others)]


def _largest_first(costs: Costs, ordered: Sequence[Span], world_size: int) -> dict[int, int]:
    loads = [0.0] * world_size
    loads[0] = teacher_seconds(costs, ordered)
    placement = {}
    for span in ordered:
        rank = min(range(world_size), key=loads.__getitem__)
        placement[span.block] = rank
        loads[rank] += costs.student_s[span.block] * span.steps
    return placement


def _score(teacher_s: float, shares: Sequence[tuple[float, float]]) -> tuple[float, float]:
    loads = _loads(teacher_s, shares)
    return max(loads), sum(loads)  # among equal makespans the one with less traffic


def _improve(placement: dict[int, int], costs: Costs, spans: Sequence[Span], world_size: int) -> dict[int, int]:
    """Apply moves of one block and swaps of two that help until none does. Only the ranks that a change touches are
    counted anew: with a hundred blocks everything else takes minutes."""
    teacher_s = teacher_seconds(costs, spans)
    shares = [_share(costs, [s for s in spans if placement[s.block] == rank]) for rank in range(world_size)]
    best = _score(teacher_s, shares)
    improved = True
    while improved:
        improved = False
        moves = [{block: rank} for block in placement for rank in range(world_size) if placement[block] != rank]
        swaps = [{a: placement[b], b: placement[a]} for a in placement for b in placement if a < b]
        for change in moves + swaps:
            candidate, changed = placement | change, list(shares)
            for rank in {*change.values(), *(placement[block] for block in change)}:
                changed[rank] = _share(costs, [s for s in spans if candidate[s.block] == rank])
            score = _score(teacher_s, changed)
            if score < best:
                placement, shares, best, improved = candidate, changed, score, True
    return placement


def _branch_and_bound(
    incumbent: dict[int, int], costs: Costs, ordered: Sequence[Span], world_size: int
) -> dict[int, int]:
    """Return the optimal placement, or the best one found within SEARCH_NODES."""
    teacher_s = teacher_seconds(costs, ordered)

    def score_of(placement: Mapping[int, int]) -> tuple[float, float]:
        owned = [[span for span in ordered if placement[span.block] == rank] for rank in range(world_size)]
        return _score(teacher_s, [_share(costs, spans) for spans in owned])

    best, best_score, nodes = incumbent, score_of(incumbent), 0
    work = [costs.student_s[span.block] * span.steps for span in ordered]
    loads = [teacher_s] + [0.0] * (world_size - 1)

    def descend(depth: int, placement: dict[int, int]) -> None:
        nonlocal best, best_score, nodes
        nodes += 1
        if nodes > SEARCH_NODES or max(loads) > best_score[0]:
            return
        if depth == len(ordered):
            nodes += len(ordered)  # a full count costs about as much as that many nodes
            score = score_of(placement)
            if score < best_score:
                best, best_score = dict(placement), score
            return
        fresh_tried = False
        for rank in sorted(range(world_size), key=loads.__getitem__):
            fresh = rank > 0 and loads[rank] == 0.0  # empty ranks are alike: one of them stands for all
            if fresh and fresh_tried:
                continue
            fresh_tried |= fresh
            loads[rank] += work[depth]
            placement[ordered[depth].block] = rank
            descend(depth + 1, placement)
            loads[rank] -= work[depth]
        placement.pop(ordered[depth].block, None)

    descend(0, {})
    return best
