"""Costs of blocks -> a plan, one function a strategy, and the choice among them. No torch here.

T_k is the teacher's forward of block k, S_k one student step, b_k the bytes of boundary k (the input of block k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from math import isfinite

import numpy as np

from distill.packing import Floats, Packing
from distill.placement import Placement, Problem, Share, largest_first, place
from distill.plan import Costs, Plan, Span, boundaries_of, memory_of, teacher_seconds
from distill.ranges import RangeCosts, best_ranges
from distill.sharing import price_of_student, price_of_teacher
from distill.traffic import busiest_line_s, over_links


class DoesNotFitError(Exception):
    """No plan fits in the memory of the ranks; the one that comes nearest needs `bytes_needed` on one of them."""

    def __init__(self, bytes_needed: int) -> None:
        super().__init__(bytes_needed)
        self.bytes_needed = bytes_needed


Planner = Callable[[Costs, Sequence[Span], int], Plan]
DEARER = (0.25, 0.5, 1.0)  # shares of a byte's time on a slow line by which placements are guided
WORTH = 0.05  # by how much a further teacher rank must shorten the makespan: costs are not known better


def plan_broadcast(costs: Costs, spans: Sequence[Span], world_size: int, teacher_ranks: int = 1) -> Plan:
    """The first rank or ranks run the teacher for everybody, a batch each in turn, and send each rank the boundaries of
    its blocks; they train too."""
    problem = broadcast_problem(costs, spans, world_size, teacher_ranks)
    best = place(problem)
    plan = replace(_on("broadcast", problem, best), teacher_ranks=teacher_ranks)
    plans = [over_links(plan, costs)]
    if busiest_line_s(plan, costs) > plan.predicted_makespan_s:  # then fewer bytes may be worth more computing
        for part in DEARER:
            dear = replace(costs, network=costs.network.dearer(part))
            other = place(broadcast_problem(dear, spans, world_size, teacher_ranks))
            found = replace(other, rank_s=tuple(problem.seconds(other.rank_of)), bound_s=best.bound_s)
            plans.append(over_links(replace(_on("broadcast", problem, found), teacher_ranks=teacher_ranks), costs))
    return min(plans, key=lambda one: one.predicted_makespan_s)


def plan_teachers(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """A broadcast with as many teacher ranks as pay."""
    numbers = sorted({1, teacher_ranks_needed(costs, spans, world_size)})
    return min(
        (plan_broadcast(costs, spans, world_size, number) for number in numbers), key=lambda p: p.predicted_makespan_s
    )


def teacher_ranks_needed(costs: Costs, spans: Sequence[Span], world_size: int) -> int:
    """Return the smallest number of teacher ranks that is within WORTH of the best, by a quick placement for each."""
    estimates = []
    for number in range(1, world_size + 1):
        problem = broadcast_problem(costs, spans, world_size, number)
        estimates.append(float(problem.packing.seconds(largest_first(problem.packing)).max()))
    return 1 + next(n for n, seconds in enumerate(estimates) if seconds <= (1 + WORTH) * min(estimates))


def plan_replicate(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Every rank runs the teacher itself, as deep as its own blocks need: no traffic, repeated work."""
    return _placed("replicate", replicate_problem(costs, spans, world_size))


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
    anew; gradients are averaged. The prediction takes a share of a batch to cost that share."""
    alone = plan_layerwise(costs, spans, 1)
    share = 1 / world_size
    slowest, hop = max(costs.slowness_of(rank) for rank in range(world_size)), costs.network.hop
    wire_s = (
        sum(costs.student_bytes[span.block] * span.steps for span in spans)
        * 2
        * (1 - share)
        * (hop.sender_s_per_byte + 1 / hop.bytes_per_s)
    ) + 2 * (world_size - 1) * hop.latency_s * sum(span.steps for span in spans)
    seconds = alone.predicted_rank_s[0] / costs.slowness_of(0) * share * slowest + wire_s
    owners = alone.owners + ((),) * (world_size - 1)
    everybody = (tuple(range(world_size)),)
    return Plan("ddp", owners, alone.spans, seconds, (seconds,) * world_size, groups=everybody)


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
    return over_links(Plan("relay", owners, ordered, max(loads, default=0.0) + fill, loads, starts), costs)


def plan_groups(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """A relay whose ranges may each have a group of consecutive ranks, which share out the rows of every batch and
    average their gradients. A share of a batch is taken to cost that share."""
    ordered = tuple(sorted(spans, key=lambda span: span.block))
    depth = max((span.block for span in ordered), default=-1) + 1
    moved, calls = np.zeros(depth + 1), np.zeros(depth + 1)
    for block in range(depth):
        moved[block + 1] = price_of_teacher(costs, block).shared * _steps_from(ordered, block)
    for span in ordered:
        price = price_of_student(costs, span.block, world_size)
        moved[span.block + 1] += price.shared * span.steps
        calls[span.block + 1] = price.hop * span.steps
    range_costs = RangeCosts(
        divided=_range_seconds(costs, ordered, depth), shared=_between(moved), hops=_between(calls)
    )
    slowness = [costs.slowness_of(rank) for rank in range(world_size)]
    ranges = best_ranges(range_costs, slowness, most=costs.batch_size or world_size)
    owners: list[tuple[int, ...]] = [()] * world_size
    starts, loads, fill = [0] * world_size, [0.0] * world_size, 0.0
    for found in ranges:
        ranks = range(found.first, found.first + found.ranks)
        seconds = float(range_costs.seconds(found.ranks)[found.start, found.end])
        owners[found.first] = tuple(s.block for s in ordered if found.start <= s.block < found.end)
        for rank in ranks:
            starts[rank], loads[rank] = found.start, seconds * max(slowness[r] for r in ranks)
        if found.end < depth:
            fill += sum(costs.teacher_s[found.start : found.end]) / found.ranks  # until the last group begins
    groups = tuple(tuple(range(r.first, r.first + r.ranks)) for r in ranges if r.ranks > 1)
    makespan_s = max(loads, default=0.0) + fill
    plan = Plan("relay", tuple(owners), ordered, makespan_s, tuple(loads), tuple(starts), groups=groups)
    return over_links(plan, costs)


def _between(by_block: np.ndarray) -> np.ndarray:
    """Return an array [start, end] of sums over blocks; `by_block[k + 1]` is block k's."""
    total = np.cumsum(by_block)
    sums: np.ndarray = total[None, :] - total[:, None]
    return sums


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
        passed_on[block] = costs.boundary_bytes[block] * steps
    for span in spans:
        student[span.block + 1] += costs.student_s[span.block] * span.steps
        trained[span.block + 1] += 1
    passed_on[0] = 0.0  # the images are everybody's own
    hop = costs.network.hop
    seconds = _between(teacher + student) + (passed_on * hop.sender_s_per_byte)[None, :]
    wire_s = passed_on / hop.bytes_per_s  # the first boundary of a range must come as fast, and its last one leave
    seconds = np.maximum(seconds, np.maximum(wire_s[:, None], wire_s[None, :]))
    seconds[_between(trained) == 0] = np.inf
    if costs.memory is not None and costs.memory.limit is not None:
        room, sizes = costs.memory.room(sends=False), np.zeros(depth + 1)
        for span in spans:
            sizes[span.block + 1] = costs.memory.block(span.block)
        seconds[_between(np.array(sizes)) > room] = np.inf
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


def broadcast_problem(costs: Costs, spans: Sequence[Span], world_size: int, teacher_ranks: int = 1) -> Problem:
    """Return what a placement costs where the first `teacher_ranks` ranks run the teacher for everybody in turn."""
    spans = sorted(spans, key=lambda span: span.block)
    teacher_s = teacher_seconds(costs, spans)
    sizes = costs.boundary_bytes
    price = [_price_of_serving(costs, rank, teacher_ranks) for rank in range(world_size)]

    def share(owned: Sequence[Span], rank: int) -> Share:
        size = sum(sizes[boundary] for boundary in boundaries_of(span.block for span in owned))
        wire = max((span.steps for span in owned), default=0) * size * price[rank]
        return sum(costs.student_s[span.block] * span.steps for span in owned), wire

    def loads(shares: Sequence[Share]) -> list[float]:
        wires = sum(wire for _, wire in shares)  # what a teacher rank computes itself does not travel to it
        taught = [(teacher_s + wires - wire) / teacher_ranks for _, wire in shares[:teacher_ranks]]
        taught += [0.0] * (world_size - teacher_ranks)
        return [
            (own + more) * costs.slowness_of(rank)
            for rank, ((own, _), more) in enumerate(zip(shares, taught, strict=True))
        ]

    bases = [teacher_s / teacher_ranks * costs.slowness_of(rank) for rank in range(teacher_ranks)]
    bases += [0.0] * (world_size - teacher_ranks)
    return Problem(
        spans=spans,
        world_size=world_size,
        work=lambda span, rank: costs.student_s[span.block] * span.steps * costs.slowness_of(rank),
        share=share,
        loads=loads,
        base=bases,
        kind=[(rank < teacher_ranks, costs.slowness_of(rank)) for rank in range(world_size)],
        packing=Packing(
            work_s=np.array([costs.student_s[span.block] * span.steps for span in spans]),
            reach_s=np.zeros(len(spans)),
            wire_s=np.array([sum(sizes[span.block : span.block + 2]) * span.steps for span in spans], float),
            shared_s=np.array(_shared(sizes, spans)),
            slowness=np.array([costs.slowness_of(rank) for rank in range(world_size)]),
            base_s=np.array(bases),
            price=np.array(price),
            teacher_ranks=teacher_ranks,
            bytes=_bytes(costs, spans),
            room=_room(costs, [rank < teacher_ranks for rank in range(world_size)]),
        ),
    )


def _bytes(costs: Costs, spans: Sequence[Span]) -> Floats | None:
    """Return the memory of every span's block, None where memory is not limited."""
    memory = costs.memory
    return np.array([memory.block(s.block) for s in spans], float) if memory and memory.limit is not None else None


def _room(costs: Costs, sends: Sequence[bool]) -> Floats | None:
    """Return the memory that every rank has for blocks, None where it is not limited."""
    memory = costs.memory
    if memory is None or memory.limit is None:
        return None
    return np.array([memory.room(sends=one) for one in sends], float)


def _shared(sizes: Sequence[int], spans: Sequence[Span]) -> list[float]:
    """Return for every span the bytes that it does not need of its own where the span before it is on its rank."""
    neighbours = ((min(a.steps, b.steps) * sizes[b.block], b.block - a.block == 1) for a, b in pairwise(spans))
    return [0.0 for _ in spans[:1]] + [float(size) if adjacent else 0.0 for size, adjacent in neighbours]


def _price_of_serving(costs: Costs, rank: int, teacher_ranks: int) -> float:
    """Seconds of computing that a byte for `rank` costs its sender, the mean over the other teacher ranks."""
    prices = [
        costs.network.link(teacher, rank).sender_s_per_byte for teacher in range(teacher_ranks) if teacher != rank
    ]
    return sum(prices) / max(1, len(prices))


def replicate_problem(costs: Costs, spans: Sequence[Span], world_size: int) -> Problem:
    """Return what a placement costs where every rank runs the teacher for itself."""

    def share(owned: Sequence[Span], _rank: int) -> Share:
        return sum(map(work, owned)) + teacher_seconds(costs, owned), 0.0

    def work(span: Span) -> float:
        return costs.student_s[span.block] * span.steps

    prefix = [0.0, *accumulate(costs.teacher_s)]
    return _independent(costs, spans, world_size, share, work, reach=lambda span: prefix[span.block + 1] * span.steps)


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
    *,
    reach: Callable[[Span], float] = lambda _: 0.0,
) -> Problem:
    """Return the problem of ranks that have nothing to do with each other."""
    spans = sorted(spans, key=lambda span: span.block)
    return Problem(
        spans=spans,
        world_size=world_size,
        work=lambda span, rank: work(span) * costs.slowness_of(rank),
        share=share,
        loads=lambda shares: [own * costs.slowness_of(rank) for rank, (own, _) in enumerate(shares)],
        base=[0.0] * world_size,
        kind=[costs.slowness_of(rank) for rank in range(world_size)],
        packing=Packing(
            work_s=np.array([work(span) for span in spans]),
            reach_s=np.array([reach(span) for span in spans]),
            wire_s=np.zeros(len(spans)),
            shared_s=np.zeros(len(spans)),
            slowness=np.array([costs.slowness_of(rank) for rank in range(world_size)]),
            base_s=np.zeros(world_size),
            price=np.zeros(world_size),
            bytes=_bytes(costs, spans),
            room=_room(costs, [False] * world_size),
        ),
    )


def _placed(strategy: str, problem: Problem) -> Plan:
    return _on(strategy, problem, place(problem))


def _on(strategy: str, problem: Problem, found: Placement) -> Plan:
    """Return the plan of a placement."""
    ranks = range(problem.world_size)
    owners = tuple(tuple(sorted(b for b, r in found.rank_of.items() if r == rank)) for rank in ranks)
    return Plan(strategy, owners, tuple(problem.spans), max(found.rank_s), found.rank_s, gap=found.gap)


PLANNERS: Mapping[str, Planner] = {
    "broadcast": plan_teachers,
    "relay": plan_relay,
    "groups": plan_groups,
    "replicate": plan_replicate,
    "layerwise": plan_layerwise,
    "serial": plan_serial,
    "ddp": plan_ddp,
}


def rank_plans(
    names: Sequence[str], costs: Costs, spans: Sequence[Span], world_size: int, *, teacher_ranks: int | None = None
) -> list[Plan]:
    """Return the plans of these planners that fit in memory, the one with the smallest predicted makespan first, among
    equals in the order of the names. A broadcast has `teacher_ranks`, or as many as pay.

    Raises DoesNotFitError where none of them fits.
    """
    planners = dict(PLANNERS)
    if teacher_ranks is not None:
        planners["broadcast"] = partial(plan_broadcast, teacher_ranks=teacher_ranks)
    plans = [replace(planners[name](costs, spans, world_size), slowness=costs.slowness) for name in names]
    memory = costs.memory
    if memory is not None and memory.limit is not None:
        needed = [max(memory_of(plan, memory)) for plan in plans]
        known = [isfinite(plan.predicted_makespan_s) for plan in plans]  # no range of a relay may fit
        plans = [p for p, most, is_known in zip(plans, needed, known, strict=True) if is_known and most <= memory.limit]
        if not plans:
            raise DoesNotFitError(min(needed))
    return sorted(plans, key=lambda p: p.predicted_makespan_s)
