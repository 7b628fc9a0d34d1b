"""What it costs a group of ranks to share out the rows of every batch, and a relay of groups as one of single ranks.

A group of g ranks takes (divided - fixed) / g + fixed for what one rank takes `divided` for, and averages its
gradients over a ring: every rank sends 2 (1 - 1/g) of their bytes in 2 (g - 1) hops (Patarasuk, Yuan 2009). That goes
on while the other blocks of the range and the teacher compute, and has to be done when the block's next batch comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from distill.planning.costs import Costs
from distill.planning.network import Network
from distill.planning.plan import Plan


@dataclass(frozen=True)
class Price:
    """What a step of g ranks costs beyond the g-th part of one rank's: (1 - 1/g) * `shared` seconds of computing, and
    (1 - 1/g) * `moved` + (g - 1) * `hop` seconds during which gradients are on their way."""

    shared: float
    moved: float = 0.0
    hop: float = 0.0

    def computing_s(self, ranks: int) -> float:
        return (1 - 1 / ranks) * self.shared

    def averaging_s(self, ranks: int) -> float:
        return (1 - 1 / ranks) * self.moved + (ranks - 1) * self.hop


def price_of_student(costs: Costs, unit: int, world_size: int) -> Price:
    """Return what sharing one step of a unit costs."""
    size = costs.student_bytes[unit] if costs.student_bytes else 0
    fixed = costs.student_fixed_s[unit] if costs.student_fixed_s else 0.0
    link = costs.network.hop
    copied = 2 * size * link.sender_s_per_byte
    return Price(fixed + copied, 2 * size / link.bytes_per_s, 2 * costs.network.hop_latency_s(world_size))


def price_of_teacher(costs: Costs, block: int) -> Price:
    """Return what sharing the teacher's forward of a block costs."""
    return Price(costs.teacher_fixed_s[block] if costs.teacher_fixed_s else 0.0)


def as_single_ranks(plan: Plan, costs: Costs) -> tuple[Plan, Costs]:
    """Return a relay of groups as one of single ranks, one a group, with the group's seconds for every block, and for
    every boundary the bytes of the busiest of the ranks that pass it on."""
    firsts = [rank for rank in range(plan.world_size) if plan.owners[rank]]
    sizes = [len(plan.group_of(rank)) for rank in firsts]
    ends = [*(plan.starts[rank] for rank in firsts[1:]), len(costs.teacher_s)]
    teacher, student, boundaries = list(costs.teacher_s), list(costs.student_s), list(costs.boundary_bytes)
    for rank, ranks, end in zip(firsts, sizes, ends, strict=True):
        computing, averaging, heaviest = 0.0, 0.0, 0.0
        for block in range(plan.starts[rank], end):
            teacher[block] = teacher[block] / ranks + price_of_teacher(costs, block).computing_s(ranks)
            computing += teacher[block]
        for unit in plan.owners[rank]:
            price = price_of_student(costs, unit, plan.world_size)
            student[unit] = student[unit] / ranks + price.computing_s(ranks)
            computing += student[unit]
            averaging += price.averaging_s(ranks)
            heaviest = max(heaviest, student[unit])
        student[plan.owners[rank][-1]] += max(0.0, heaviest + averaging - computing)  # what nothing hides
    for (_, before), (rank, after) in pairwise(zip(firsts, sizes, strict=True)):
        boundaries[plan.starts[rank]] //= min(before, after)
    single = replace(
        plan,
        owners=tuple(plan.owners[rank] for rank in firsts),
        starts=tuple(plan.starts[rank] for rank in firsts),
        predicted_rank_s=tuple(plan.predicted_rank_s[rank] for rank in firsts),
        groups=(),
    )
    slowness = tuple(max(costs.slowness_of(rank) for rank in plan.group_of(first)) for first in firsts)
    network = _between_groups(costs.network, [plan.group_of(first) for first in firsts])
    return single, replace(
        costs, teacher_s=tuple(teacher), student_s=tuple(student), boundary_bytes=tuple(boundaries),
        slowness=slowness, network=network,
    )  # fmt: skip


def _between_groups(network: Network, groups: Sequence[Sequence[int]]) -> Network:
    """Groups are on one host where all of their ranks are: rows of one batch may cross between any two of them."""
    hosts, host = [0] * len(groups), 0
    for index, (before, after) in enumerate(pairwise(groups), start=1):
        host += network.host_of(before[0]) != network.host_of(after[-1])
        hosts[index] = host
    return replace(network, hosts=tuple(hosts))


def gradient_bytes(plan: Plan, costs: Costs) -> float:
    """Return the bytes that all groups send while they average the gradients of all steps."""
    sizes = {span.unit: costs.student_bytes[span.unit] if costs.student_bytes else 0 for span in plan.spans}
    return sum(
        2 * (len(group) - 1) * sizes[span.unit] * span.steps
        for group in plan.groups
        for span in plan.spans_of(group[0])
    )
