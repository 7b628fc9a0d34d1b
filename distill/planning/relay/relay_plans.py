"""Plans in which ranks, or groups of them, own contiguous ranges of blocks. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.planning.costs import Costs, Span, in_order
from distill.planning.plan import Plan
from distill.planning.relay.groups import price_of_student, price_of_teacher
from distill.planning.relay.ranges import RangeCosts, best_ranges
from distill.planning.traffic import over_links


def plan_relay(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """Every rank owns a contiguous range of blocks: it receives its first boundary from the rank before, runs the
    teacher over its range, passes the last boundary on and trains its students. Exact, by dynamic programming over
    (ranks used, blocks covered); O(ranks * blocks^2)."""
    ordered = in_order(spans)
    depth = max((span.target for span in ordered), default=0)
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
    owners = tuple(tuple(s.unit for s in ordered if s.input in owned) for owned in ranges)
    loads = tuple(float(seconds[r.start, r.stop]) * costs.slowness_of(rank) for rank, r in enumerate(ranges))
    busy = [r for r in ranges if len(r)]
    fill = sum(sum(costs.teacher_s[block] for block in owned) for owned in busy[:-1])  # until the last rank begins
    starts = tuple(r.start for r in ranges)
    return over_links(Plan("relay", owners, ordered, max(loads, default=0.0) + fill, loads, starts), costs)


def plan_groups(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """A relay whose ranges may each have a group of consecutive ranks, which share out the rows of every batch and
    average their gradients. A share of a batch is taken to cost that share."""
    ordered = in_order(spans)
    depth = max((span.target for span in ordered), default=0)
    shared, moved, hops, students = np.zeros((4, depth + 1))
    for block in range(depth):
        shared[block + 1] = price_of_teacher(costs, block).shared * _steps_from(ordered, block)
    for span in ordered:
        price = price_of_student(costs, span.unit, world_size)
        shared[span.target] += price.shared * span.steps
        moved[span.target] += price.moved * span.steps
        hops[span.target] += price.hop * span.steps
        students[span.target] = max(students[span.target], costs.student_s[span.unit] * span.steps)
    range_costs = RangeCosts(
        divided=_range_seconds(costs, ordered, depth),
        shared=_between(shared),
        heaviest=_greatest_between(students),
        moved=_between(moved),
        hops=_between(hops),
    )
    slowness = [costs.slowness_of(rank) for rank in range(world_size)]
    ranges = best_ranges(range_costs, slowness, most=costs.batch_size or world_size)
    owners: list[tuple[int, ...]] = [()] * world_size
    starts, loads, fill = [0] * world_size, [0.0] * world_size, 0.0
    for found in ranges:
        ranks = range(found.first, found.first + found.ranks)
        seconds = float(range_costs.seconds(found.ranks)[found.start, found.end])
        owners[found.first] = tuple(s.unit for s in ordered if found.start <= s.input < found.end)
        for rank in ranks:
            starts[rank], loads[rank] = found.start, seconds * max(slowness[r] for r in ranks)
        if found.end < depth:
            fill += sum(costs.teacher_s[found.start : found.end]) / found.ranks  # until the last group begins
    groups = tuple(tuple(range(r.first, r.first + r.ranks)) for r in ranges if r.ranks > 1)
    makespan_s = max(loads, default=0.0) + fill
    plan = Plan("relay", tuple(owners), ordered, makespan_s, tuple(loads), tuple(starts), groups=groups)
    return over_links(plan, costs)


def _between(by_block: np.ndarray) -> np.ndarray:
    """Return an array [start, end] of sums over blocks; `by_block[k + 1]` is block k's and that of all that ends with
    it."""
    total = np.cumsum(by_block)
    sums: np.ndarray = total[None, :] - total[:, None]
    return sums


def _greatest_between(by_block: np.ndarray) -> np.ndarray:
    """Return an array [start, end] of the greatest value of any block; 0 where there is none."""
    greatest = np.zeros((len(by_block), len(by_block)))
    for start in range(len(by_block) - 1):
        greatest[start, start + 1 :] = np.maximum.accumulate(by_block[start + 1 :])
    return greatest


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
        student[span.target] += costs.student_s[span.unit] * span.steps
        trained[span.target] += 1
    passed_on[0] = 0.0  # the images are everybody's own
    hop = costs.network.hop
    seconds = _between(teacher + student) + (passed_on * hop.sender_s_per_byte)[None, :]
    wire_s = passed_on / hop.bytes_per_s  # the first boundary of a range must come as fast, and its last one leave
    seconds = np.maximum(seconds, np.maximum(wire_s[:, None], wire_s[None, :]))
    # A rank without units is passed by (Plan.group_before): nobody would run the teacher over its range.
    seconds[_between(trained) == 0] = np.inf
    if costs.memory is not None and costs.memory.limit is not None:
        room, sizes = costs.memory.room(sends=False), np.zeros(depth + 1)
        for span in spans:
            sizes[span.target] += costs.memory.unit(span.unit)
        seconds[_between(np.array(sizes)) > room] = np.inf
    inside = sorted({boundary for span in spans for boundary in range(span.input + 1, span.target)})
    seconds[inside, :] = seconds[:, inside] = np.inf  # a unit is not cut in two
    # Only now, after all that is not allowed: a rank may always be idle.
    np.fill_diagonal(seconds, 0.0)
    seconds[np.tril_indices(depth + 1, -1)] = np.inf
    return seconds


def _steps_from(spans: Sequence[Span], block: int) -> int:
    """The number of batches that some unit trains on which ends behind the block `block`."""
    deeper = sorted((s.first, s.budget) for s in spans if s.target > block and s.steps > 0)
    total, reached = 0, 0
    for first, budget in deeper:
        # A batch that several units train on counts once, as the teacher runs once for all of them.
        total += max(0, budget - max(first, reached))
        reached = max(reached, budget)
    return total
