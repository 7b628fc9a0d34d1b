"""Costs of blocks -> a plan, one function a strategy, and the choice among them. No torch here.

T_k is the teacher's forward of block k, S_k one student step, b_k the bytes of boundary k (the input of block k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import numpy as np

from distill.placement import Problem, Share, place
from distill.plan import Costs, Plan, Span, boundaries_of, teacher_seconds

Planner = Callable[[Costs, Sequence[Span], int], Plan]


def plan_broadcast(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Rank 0 runs the teacher once for everybody and sends each rank the boundaries of its blocks; it trains too."""
    return _placed("broadcast", broadcast_problem(costs, spans, world_size))


def plan_replicate(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Every rank runs the teacher itself, as deep as its own blocks need: no traffic, repeated work."""
    return _placed("replicate", replicate_problem(costs, spans, world_size))


def plan_cached(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Every rank reads what its blocks need from activations that are recorded before: no teacher, no traffic."""
    return _placed("cached", cached_problem(costs, spans, world_size))


def plan_layerwise(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Every block is a job of its own, with a teacher prefix of its own, and a rank does its jobs one after another.

    Source: Blakeney et al. 2021, section 3 (arXiv:2012.03096), with an optimal placement in place of their bins.
    """
    return _placed("layerwise", layerwise_problem(costs, spans, world_size))


def plan_serial(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Rank 0 trains one block after another, each with the teacher's prefix anew; other ranks idle."""
    alone = plan_layerwise(costs, spans, 1)
    idle = world_size - 1
    return Plan(
        "serial", alone.owners + ((),) * idle, alone.spans, alone.predicted_makespan_s,
        alone.predicted_rank_s + (0.0,) * idle,
    )  # fmt: skip


def plan_ddp(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """All ranks train the same block, one block after another, each on its rows of the batch with the teacher's prefix
    anew; gradients are averaged. The prediction takes a share of a batch to cost that share, and every gradient byte to
    cross the wire twice less a share (ring all-reduce: Patarasuk, Yuan 2009)."""
    alone = plan_layerwise(costs, spans, 1)
    share = 1 / world_size
    slowest = max(costs.slowness_of(rank) for rank in range(world_size))
    wire_s = (
        sum(costs.student_bytes[span.block] * span.steps for span in spans)
        * 2
        * (1 - share)
        * costs.network.link(0, world_size - 1).sender_s_per_byte
    )
    seconds = alone.predicted_rank_s[0] / costs.slowness_of(0) * share * slowest + wire_s
    owners = alone.owners + ((),) * (world_size - 1)
    return Plan("ddp", owners, alone.spans, seconds, (seconds,) * world_size)


def plan_relay(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Every rank owns a contiguous range of blocks: it receives its first boundary from the rank before, runs the
    teacher over its range, passes the last boundary on and trains its students. Exact, by dynamic programming over
    (ranks used, blocks covered); O(ranks * blocks^2)."""
    ordered = tuple(sorted(spans, key=lambda span: span.block))
    depth = max((span.block for span in ordered), default=-1) + 1
    seconds = _range_seconds(costs, ordered, depth)
    best = np.full((world_size + 1, depth + 1), np.inf)
    best[0, 0] = 0.0
    cut = np.zeros((world_size + 1, depth + 1), dtype=int)
    for rank in range(world_size):
        candidates = np.maximum(best[rank][:, None], seconds * costs.slowness_of(rank))
        cut[rank + 1] = candidates.argmin(axis=0)
        best[rank + 1] = candidates.min(axis=0)
    ends = [depth]
    for rank in range(world_size, 0, -1):
        ends.append(int(cut[rank, ends[-1]]))
    ends.reverse()  # rank r covers the blocks from ends[r] up to ends[r + 1]
    ranges = [range(ends[rank], ends[rank + 1]) for rank in range(world_size)]
    owners = tuple(tuple(s.block for s in ordered if s.block in owned) for owned in ranges)
    loads = tuple(float(seconds[r.start, r.stop]) * costs.slowness_of(rank) for rank, r in enumerate(ranges))
    busy = [r for r in ranges if len(r)]
    fill = sum(sum(costs.teacher_s[block] for block in owned) for owned in busy[:-1])  # until the last rank begins
    starts = tuple(r.start for r in ranges)
    return Plan("relay", owners, ordered, max(loads, default=0.0) + fill, loads, starts)


def _range_seconds(costs: Costs, spans: Sequence[Span], depth: int) -> np.ndarray:
    """Return an array [start, end] of the seconds of a rank with the blocks from start up to end; the empty range costs
    nothing, one that trains nothing is not allowed, and neither is end < start."""
    teacher = np.zeros(depth + 1)
    student = np.zeros(depth + 1)
    trained = np.zeros(depth + 1, dtype=int)
    passed_on = np.zeros(depth + 1)
    for block in range(depth):
        steps = _steps_from(spans, block)
        teacher[block + 1] = costs.teacher_s[block] * steps
        passed_on[block] = costs.boundary_bytes[block] * costs.network.within.sender_s_per_byte * steps
    for span in spans:
        student[span.block + 1] += costs.student_s[span.block] * span.steps
        trained[span.block + 1] += 1
    own, count = np.cumsum(teacher + student), np.cumsum(trained)
    seconds = own[None, :] - own[:, None] + passed_on[None, :]
    seconds[count[None, :] == count[:, None]] = np.inf
    np.fill_diagonal(seconds, 0.0)
    seconds[np.tril_indices(depth + 1, -1)] = np.inf
    return seconds


def _steps_from(spans: Sequence[Span], block: int) -> int:
    """The number of batches that some block at or behind `block` trains on."""
    deeper = sorted((s.first, s.budget) for s in spans if s.block >= block and s.steps > 0)
    total, reached = 0, 0
    for first, budget in deeper:
        total += max(0, budget - max(first, reached))
        reached = max(reached, budget)
    return total


def broadcast_problem(costs: Costs, spans: Sequence[Span], world_size: int) -> Problem:
    """Return what a placement costs where rank 0 runs the teacher for everybody."""
    teacher_s = teacher_seconds(costs, spans)

    def share(owned: Sequence[Span], rank: int) -> Share:
        size = sum(costs.boundary_bytes[boundary] for boundary in boundaries_of(span.block for span in owned))
        wire = max((span.steps for span in owned), default=0) * size * costs.network.link(0, rank).sender_s_per_byte
        return sum(costs.student_s[span.block] * span.steps for span in owned), wire

    def loads(shares: Sequence[Share]) -> list[float]:
        (own, _), *others = shares  # rank 0's own boundaries do not travel
        first = (teacher_s + own + sum(wire for _, wire in others)) * costs.slowness_of(0)
        return [first, *(own * costs.slowness_of(rank) for rank, (own, _) in enumerate(others, start=1))]

    return Problem(
        spans=spans,
        world_size=world_size,
        work=lambda span, rank: costs.student_s[span.block] * span.steps * costs.slowness_of(rank),
        share=share,
        loads=loads,
        base=[teacher_s * costs.slowness_of(0)] + [0.0] * (world_size - 1),
        kind=[(rank == 0, costs.slowness_of(rank)) for rank in range(world_size)],
    )


def replicate_problem(costs: Costs, spans: Sequence[Span], world_size: int) -> Problem:
    """Return what a placement costs where every rank runs the teacher for itself."""

    def share(owned: Sequence[Span], _rank: int) -> Share:
        return sum(map(work, owned)) + teacher_seconds(costs, owned), 0.0

    def work(span: Span) -> float:
        return costs.student_s[span.block] * span.steps

    return _independent(costs, spans, world_size, share, work)


def cached_problem(costs: Costs, spans: Sequence[Span], world_size: int) -> Problem:
    """Return what a placement costs where every rank reads its blocks' boundaries, neighbours' common ones once."""

    def share(owned: Sequence[Span], _rank: int) -> Share:
        size = sum(costs.boundary_bytes[boundary] for boundary in boundaries_of(span.block for span in owned))
        read_s = max((span.steps for span in owned), default=0) * size * costs.read_s_per_byte
        return sum(map(work, owned)) + read_s, 0.0

    def work(span: Span) -> float:
        return costs.student_s[span.block] * span.steps

    return _independent(costs, spans, world_size, share, work)


def layerwise_problem(costs: Costs, spans: Sequence[Span], world_size: int) -> Problem:
    """Return what a placement costs where every block runs the teacher for itself."""
    prefix = [0.0, *accumulate(costs.teacher_s)]

    def work(span: Span) -> float:
        return span.steps * (costs.student_s[span.block] + prefix[span.block + 1])

    return _independent(costs, spans, world_size, lambda owned, _rank: (sum(map(work, owned)), 0.0), work)


def _independent(
    costs: Costs,
    spans: Sequence[Span],
    world_size: int,
    share: Callable[[Sequence[Span], int], Share],
    work: Callable[[Span], float],
) -> Problem:
    """Return the problem of ranks that have nothing to do with each other."""
    return Problem(
        spans=spans,
        world_size=world_size,
        work=lambda span, rank: work(span) * costs.slowness_of(rank),
        share=share,
        loads=lambda shares: [own * costs.slowness_of(rank) for rank, (own, _) in enumerate(shares)],
        base=[0.0] * world_size,
        kind=[costs.slowness_of(rank) for rank in range(world_size)],
    )


def _placed(strategy: str, problem: Problem) -> Plan:
    placement = place(problem)
    loads = problem.seconds(placement)
    ranks = range(problem.world_size)
    owners = tuple(tuple(sorted(b for b, r in placement.items() if r == rank)) for rank in ranks)
    ordered = tuple(sorted(problem.spans, key=lambda span: span.block))
    return Plan(strategy, owners, ordered, max(loads), tuple(loads))


PLANNERS: Mapping[str, Planner] = {
    "broadcast": plan_broadcast,
    "relay": plan_relay,
    "replicate": plan_replicate,
    "layerwise": plan_layerwise,
    "serial": plan_serial,
    "ddp": plan_ddp,
}


def rank_plans(names: Sequence[str], costs: Costs, spans: Sequence[Span], world_size: int) -> list[Plan]:
    """Return the plans of these strategies, the one with the smallest predicted makespan first."""
    return sorted((PLANNERS[name](costs, spans, world_size) for name in names), key=lambda p: p.predicted_makespan_s)
