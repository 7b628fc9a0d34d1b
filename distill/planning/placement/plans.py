"""Plans whose units may be on any rank: one function a strategy, around one search. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distill.planning.costs import Costs, Span
from distill.planning.placement.problems import broadcast_problem, cached_problem, layerwise_problem, replicate_problem
from distill.planning.placement.search import Placement, Problem, largest_first, place
from distill.planning.plan import Plan
from distill.planning.relay.groups import price_of_student
from distill.planning.traffic import busiest_line_s, over_links

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
            # The dearer bytes only guided the placement; its seconds are counted at what bytes really cost.
            found = replace(other, rank_s=tuple(problem.seconds(other.rank_of)), bound_s=best.bound_s)
            plans.append(over_links(replace(_on("broadcast", problem, found), teacher_ranks=teacher_ranks), costs))
    return min(plans, key=lambda one: one.predicted_makespan_s)


def plan_teachers(costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
    """A broadcast with as many teacher ranks as pay."""
    # One as well: the other number is an estimate, by quick placements.
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
    anew; gradients are averaged. The prediction takes a share of a batch to cost that share."""
    alone = plan_layerwise(costs, spans, 1)
    slowest = max(costs.slowness_of(rank) for rank in range(world_size))
    seconds = slowest * sum(_shared_step_s(costs, span, world_size) * span.steps for span in spans)
    owners = alone.owners + ((),) * (world_size - 1)
    everybody = (tuple(range(world_size)),)
    return Plan("ddp", owners, alone.spans, seconds, (seconds,) * world_size, groups=everybody)


def _shared_step_s(costs: Costs, span: Span, ranks: int) -> float:
    """Return the seconds of a unit's step, with the teacher's prefix anew, on its share of the rows: gradients are
    averaged while the prefix of the next batch computes."""
    teacher_s, price = sum(costs.teacher_s[: span.target]) / ranks, price_of_student(costs, span.unit, ranks)
    step_s = costs.student_s[span.unit] / ranks + price.computing_s(ranks)
    return step_s + max(teacher_s, price.averaging_s(ranks))


def _placed(strategy: str, problem: Problem) -> Plan:
    return _on(strategy, problem, place(problem))


def _on(strategy: str, problem: Problem, found: Placement) -> Plan:
    """Return the plan of a placement."""
    ranks = range(problem.world_size)
    owners = tuple(tuple(sorted(b for b, r in found.rank_of.items() if r == rank)) for rank in ranks)
    return Plan(strategy, owners, tuple(problem.spans), max(found.rank_s), found.rank_s, gap=found.gap)
