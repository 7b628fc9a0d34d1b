"""Plans of units: several candidates of a block, and students that span blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from distill.planning.costs import Costs, Span, in_order, teacher_seconds
from distill.planning.memory_model import Memory
from distill.planning.network import Flow, Link, Network
from distill.planning.placement.plans import plan_broadcast, plan_cached, plan_ddp, plan_layerwise, plan_replicate
from distill.planning.placement.problems import broadcast_problem
from distill.planning.plan import Plan, memory_of
from distill.planning.relay.relay_plans import plan_groups, plan_relay
from distill.planning.schedule import Checks, Feed
from distill.simulation.simulator import simulate

Instance = tuple[Costs, list[Span], int]


def flows_of(plan: Plan, costs: Costs) -> list[Flow]:
    return plan.how.flows(plan, costs)


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Up to four blocks and six units between any two boundaries."""
    blocks = draw(st.integers(1, 4))
    stretch = st.integers(0, blocks - 1).flatmap(lambda i: st.tuples(st.just(i), st.integers(i + 1, blocks)))
    stretches = draw(st.lists(stretch, min_size=1, max_size=6))
    seconds = st.floats(0.01, 1.0)
    spans = [Span(number, draw(st.integers(0, 5)), 9, *ends) for number, ends in enumerate(stretches)]
    costs = Costs(
        tuple(draw(st.lists(seconds, min_size=blocks, max_size=blocks))),
        tuple(draw(st.lists(seconds, min_size=len(spans), max_size=len(spans)))),
        tuple(draw(st.lists(st.integers(1, 1000), min_size=blocks + 1, max_size=blocks + 1))),
    )
    return costs, spans, draw(st.integers(1, 3))


def students_s(costs: Costs, spans: Sequence[Span]) -> float:
    return sum(costs.student_s[span.unit] * span.steps for span in spans)


@settings(deadline=None, max_examples=60)
@given(instances())
def test_replicas_are_placed_as_well_as_by_trying_everything(instance: Instance) -> None:
    costs, spans, world_size = instance

    def makespan(ranks: Sequence[int]) -> float:
        shares = [[s for s, r in zip(spans, ranks, strict=True) if r == rank] for rank in range(world_size)]
        return max(students_s(costs, share) + teacher_seconds(costs, share) for share in shares)

    best = min(makespan(ranks) for ranks in itertools.product(range(world_size), repeat=len(spans)))
    plan = plan_replicate(costs, spans, world_size)
    assert plan.predicted_makespan_s == pytest.approx(makespan([owner(plan, span.unit) for span in spans]))
    assert plan.predicted_makespan_s <= best * 1.02


@settings(deadline=None, max_examples=60)
@given(instances(), st.integers(1, 2))
def test_a_broadcast_s_arrays_never_cost_more_than_it_really_does(instance: Instance, teacher_ranks: int) -> None:
    """So that what they prove of units with boundaries in common holds."""
    costs, spans, world_size = instance
    priced = replace(costs, network=Network(within=Link(sender_s_per_byte=1e-3)))
    problem = broadcast_problem(priced, spans, world_size, min(teacher_ranks, world_size))
    for ranks in itertools.product(range(world_size), repeat=len(spans)):
        real = problem.seconds({span.unit: rank for span, rank in zip(problem.spans, ranks, strict=True)})
        counted = problem.packing.seconds(np.array(ranks, dtype=np.intp))
        assert all(one <= other * (1 + 1e-9) + 1e-12 for one, other in zip(counted, real, strict=True))


def owner(plan: Plan, unit: int) -> int:
    return next(rank for rank, owned in enumerate(plan.owners) if unit in owned)


@settings(deadline=None, max_examples=60)
@given(instances())
def test_no_relay_cuts_a_unit_in_two_and_it_is_as_good_as_any_that_does_not(instance: Instance) -> None:
    costs, spans, world_size = instance
    plan = plan_relay(costs, spans, world_size)
    assert sorted(unit for owned in plan.owners for unit in owned) == sorted(span.unit for span in spans)
    owning = [rank for rank in range(world_size) if plan.owners[rank]]
    ends = [*(plan.starts[rank] for rank in owning[1:]), len(costs.teacher_s)]
    for rank, end in zip(owning, ends, strict=True):
        assert all(plan.starts[rank] <= span.input and span.target <= end for span in plan.spans_of(rank))
    depth = max(span.target for span in spans)
    loads = []
    for count in range(world_size):
        for cuts in itertools.combinations(range(1, depth), count):
            if any(span.input < cut < span.target for span in spans for cut in cuts):
                continue
            bounds = [0, *cuts, depth]
            parts = [[s for s in spans if a <= s.input and s.target <= b] for a, b in itertools.pairwise(bounds)]
            if all(parts):
                loads.append(max(_relayed(costs, spans, part, a) for part, a in zip(parts, bounds, strict=False)))
    assert max(plan.predicted_rank_s) == pytest.approx(min(loads))


def _relayed(costs: Costs, spans: Sequence[Span], part: Sequence[Span], start: int) -> float:
    """A rank's seconds: its students, and its stretch of the teacher for all that is behind each of its blocks."""
    end = min((s.input for s in spans if s.input >= max(p.target for p in part)), default=None)
    stop = max(p.target for p in part) if end is None else end
    teacher = 0.0
    for block in range(start, stop):
        steps = {step for s in spans if s.target > block for step in range(s.first, s.budget)}
        teacher += costs.teacher_s[block] * len(steps)
    return students_s(costs, part) + teacher


@given(instances())
@settings(deadline=None, max_examples=40)
def test_every_planner_plans_every_unit_once_and_its_plan_can_be_simulated(instance: Instance) -> None:
    costs, spans, world_size = instance
    for planner in (plan_broadcast, plan_relay, plan_groups, plan_replicate, plan_layerwise, plan_cached, plan_ddp):
        plan = planner(costs, spans, world_size)
        assert sorted(unit for owned in plan.owners for unit in owned) == sorted(span.unit for span in spans)
        assert Plan.from_json(plan.to_json()) == plan
        assert simulate(plan, costs).makespan_s > 0


def test_a_broadcast_sends_a_rank_a_boundary_once_however_many_candidates_want_it() -> None:
    spans = [Span(0, 0, 5), Span(1, 0, 5), Span(3, 0, 5, 1, 2), Span(4, 0, 5, 1, 3)]
    plan = Plan("broadcast", ((0,), (1, 3, 4)), tuple(spans), 1.0, (1.0, 1.0))
    costs = Costs((1.0,) * 3, (1.0,) * 5, (1, 10, 100, 1000))
    assert [flow.size for flow in flows_of(plan, costs)] == [5 * (10 + 100 + 1000)]


def test_a_feed_s_boundaries_are_those_of_its_units() -> None:
    feed = Feed(0, [Span(1, 0, 2), Span(7, 0, 3, 0, 4)], Checks())
    assert feed.cursor is not None
    assert feed.boundaries_at(feed.cursor) == {0, 1, 2, 4}
    feed.finish(1)
    assert feed.boundaries_at(feed.cursor) == {0, 4}


def test_memory_counts_the_boundaries_of_units() -> None:
    memory = Memory(
        resident=0, student=(0, 1, 2, 3), step=(0,) * 4, boundary=(1, 10, 100), window=2,
        ends=((0, 1), (1, 2), (1, 2), (0, 2)),
    )  # fmt: skip
    assert memory.activations([1, 2]) == 110
    assert memory.activations([2, 3]) == 111
    plan = Plan("replicate", ((1, 3),), (Span(1, 0, 2), Span(3, 0, 2, 0, 2)), 1.0, (1.0,))
    assert memory_of(plan, memory) == (memory.alone([1, 3]),)


def test_spans_are_in_the_order_of_the_network() -> None:
    spans = [Span(5, 0, 1, 0, 2), Span(1, 0, 1), Span(4, 0, 1, 0, 1), Span(0, 0, 1)]
    assert [span.unit for span in in_order(spans)] == [0, 4, 5, 1]
