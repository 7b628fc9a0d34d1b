"""Every strategy's plan: its arithmetic, and that no placement beats it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.planning.costs import Costs, Span, teacher_seconds
from distill.planning.network import Link, Network
from distill.planning.placement.plans import (
    plan_broadcast,
    plan_layerwise,
    plan_replicate,
    plan_serial,
    plan_teachers,
    teacher_ranks_needed,
)
from distill.planning.placement.problems import layerwise_problem, replicate_problem
from distill.planning.placement.search import Problem
from distill.planning.plan import STRATEGIES, Plan
from distill.planning.relay.relay_plans import plan_relay
from distill.planning.strategies.broadcast import Broadcast
from distill.planning.strategies.choice import rank_plans
from distill.planning.unit import boundaries_of

Instance = tuple[Costs, list[Span], int]
seconds = st.floats(0.0, 10.0, allow_nan=False).map(lambda value: round(value, 3))
slowness = st.sampled_from([0.5, 1.0, 2.0])


def wire(sender_s_per_byte: float) -> Network:
    """Ranks of one host, where a byte costs its sender so much."""
    return Network(within=Link(sender_s_per_byte=sender_s_per_byte))


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    blocks, world_size = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    per_block = st.lists(seconds, min_size=blocks, max_size=blocks)
    sizes = draw(st.lists(st.integers(0, 1000), min_size=blocks + 1, max_size=blocks + 1))
    slow = draw(st.lists(slowness, min_size=world_size, max_size=world_size))
    costs = Costs(
        tuple(draw(per_block)),
        tuple(draw(per_block)),
        tuple(sizes),
        slowness=tuple(slow),
        network=wire(draw(st.sampled_from([0.0, 1e-3]))),
    )
    trained = draw(st.sets(st.integers(0, blocks - 1), min_size=1))
    firsts = {block: draw(st.integers(0, 9)) for block in sorted(trained)}
    return costs, [Span(block, first, 10) for block, first in firsts.items()], world_size


def brute_force(problem: Problem) -> float:
    blocks = [span.unit for span in problem.spans]
    placements = itertools.product(range(problem.world_size), repeat=len(blocks))
    return min(max(problem.seconds(dict(zip(blocks, ranks, strict=True)))) for ranks in placements)


@pytest.mark.parametrize(
    ("planner", "problem"), [(plan_replicate, replicate_problem), (plan_layerwise, layerwise_problem)]
)
@settings(max_examples=40, deadline=None)
@given(instance=instances())
def test_no_placement_beats_the_plan(
    planner: Callable[..., Plan], problem: Callable[..., Problem], instance: Instance
) -> None:
    assert planner(*instance).predicted_makespan_s <= brute_force(problem(*instance)) * (1 + 1e-9) + 1e-9


def relay_seconds(costs: Costs, spans: Sequence[Span], ends: Sequence[int]) -> list[float]:
    """Every rank's seconds where rank r has the blocks from ends[r] up to ends[r + 1], counted step by step."""
    loads = []
    depth = ends[-1]
    for rank, (start, end) in enumerate(itertools.pairwise(ends)):
        total = 0.0
        for step in range(10):
            deepest = max((s.unit for s in spans if s.first <= step < s.budget), default=-1)
            total += sum(costs.teacher_s[start : min(end, deepest + 1)])
            if start < end < depth and deepest >= end:
                total += costs.boundary_bytes[end] * costs.network.within.sender_s_per_byte
        total += sum(costs.student_s[s.unit] * s.steps for s in spans if start <= s.unit < end)
        loads.append(total * costs.slowness_of(rank))
    return loads


@settings(max_examples=60, deadline=None)
@given(instance=instances())
def test_no_contiguous_placement_beats_the_relay(instance: Instance) -> None:
    costs, spans, world_size = instance
    plan = plan_relay(costs, spans, world_size)
    depth = max(span.unit for span in spans) + 1
    trained = {span.unit for span in spans}
    possible = [
        (0, *cuts, depth)
        for cuts in itertools.combinations_with_replacement(range(depth + 1), world_size - 1)
        if all(a == b or trained & set(range(a, b)) for a, b in itertools.pairwise((0, *cuts, depth)))
    ]
    best = min(max(relay_seconds(costs, spans, ends)) for ends in possible)
    assert max(plan.predicted_rank_s) == pytest.approx(best, rel=1e-9, abs=1e-9)
    ends = [*plan.starts, depth]
    assert list(plan.predicted_rank_s) == pytest.approx(relay_seconds(costs, spans, ends), abs=1e-9)
    assert sorted(block for owned in plan.owners for block in owned) == sorted(trained)


def test_a_relay_counts_the_time_until_its_last_rank_begins() -> None:
    costs = Costs((1.0,) * 4, (3.0,) * 4, (0,) * 5)
    plan = plan_relay(costs, [Span(block, 0, 10) for block in range(4)], 2)
    assert plan.owners == ((0, 1), (2, 3))
    assert plan.starts == (0, 2)
    assert plan.predicted_rank_s == (80.0, 80.0)
    assert plan.predicted_makespan_s == 82.0


def test_serial_pays_the_teachers_prefix_for_every_block() -> None:
    costs = Costs((1.0, 2.0, 4.0), (0.5, 0.5, 0.5), (0,) * 4)
    plan = plan_serial(costs, [Span(block, 0, 10) for block in range(3)], 2)
    assert plan.predicted_makespan_s == 10 * (1 + 3 + 7 + 1.5)
    assert plan.owners == ((0, 1, 2), ())


def test_a_slow_rank_gets_less() -> None:
    costs = Costs((0.0,) * 6, (1.0,) * 6, (0,) * 7, slowness=(1.0, 2.0))
    spans = [Span(block, 0, 1) for block in range(6)]
    for name in ("broadcast", "replicate", "layerwise", "relay"):
        plan = STRATEGIES[name].plan(costs, spans, 2)
        assert [len(owned) for owned in plan.owners] == [4, 2], name
        assert plan.predicted_makespan_s == 4.0


def test_the_ranking_begins_with_the_fastest() -> None:
    cheap_wire = Costs((1.0,) * 4, (1.0,) * 4, (1,) * 5)
    dear_wire = Costs((1.0,) * 4, (1.0,) * 4, (1,) * 5, network=wire(100.0))
    spans = [Span(block, 0, 10) for block in range(4)]
    asked = [STRATEGIES[name] for name in ("broadcast", "replicate", "relay")]
    assert rank_plans([Broadcast(1), *asked[1:]], cheap_wire, spans, 4)[0].strategy == "relay"
    assert rank_plans(asked, cheap_wire, spans, 4)[0].label.startswith("broadcast with")
    ranking = rank_plans(asked, dear_wire, spans, 4)
    assert ranking[0].strategy == "replicate"
    makespans = [plan.predicted_makespan_s for plan in ranking]
    assert makespans == sorted(makespans)
    assert len(ranking) == 3


def test_of_plans_predicted_as_good_as_equal_the_one_that_sends_least_comes_first() -> None:
    costs = Costs((0.01, 0.01), (10.0, 10.0), (100, 1, 1))
    asked = [STRATEGIES[name] for name in ("broadcast", "relay", "replicate")]
    plans = rank_plans(asked, costs, [Span(block, 0, 10) for block in range(2)], 2)
    assert [plan.strategy for plan in plans] == ["replicate", "relay", "broadcast"]
    seconds = [plan.predicted_makespan_s for plan in plans]
    assert seconds[1] < seconds[0] < 1.02 * seconds[1]


def test_two_hundred_blocks_on_a_thousand_ranks_are_relayed_in_two_seconds() -> None:
    generator = np.random.default_rng(0)
    costs = Costs(
        tuple(generator.uniform(1, 5, 200)), tuple(generator.uniform(1, 9, 200)), (1000,) * 201, network=wire(1e-6)
    )
    start = time.process_time()
    plan = plan_relay(costs, [Span(block, 0, 100) for block in range(200)], 1024)
    assert time.process_time() - start < 2.0
    assert max(plan.predicted_rank_s) >= 100 * max(np.array(costs.teacher_s) + costs.student_s)


def test_teacher_of_a_replica_is_only_as_deep_as_its_own_blocks() -> None:
    costs = Costs((1.0, 1.0, 8.0), (1.0, 1.0, 1.0), (0,) * 4)
    spans = [Span(block, 0, 10) for block in range(3)]
    plan = plan_replicate(costs, spans, 2)
    assert plan.owners in (((0, 1), (2,)), ((2,), (0, 1)))
    assert sorted(plan.predicted_rank_s) == [40.0, 110.0]
    assert teacher_seconds(costs, spans[:2]) == 20.0


def test_ranks_that_share_a_block_pay_for_its_gradients() -> None:
    costs = Costs((1.0, 1.0), (2.0, 2.0), (0,) * 3, network=wire(0.01), student_bytes=(100, 50))
    spans = [Span(0, 0, 10), Span(1, 0, 10)]
    plan = STRATEGIES["ddp"].plan(costs, spans, 2)
    assert plan.owners == ((0, 1), ())
    assert plan.trained_by(1) == plan.trained_by(0) == tuple(spans)
    assert plan.predicted_makespan_s == pytest.approx(10 * (1 + 2 + 2 + 2) / 2 + 0.01 * 150 * 10)


@pytest.mark.parametrize("slowness", [(1.0, 2.0), (2.0, 1.0), (2.0, 2.0)])
def test_ranks_that_share_a_block_go_as_fast_as_the_slowest(slowness: tuple[float, float]) -> None:
    costs = Costs((1.0, 1.0), (2.0, 2.0), (0,) * 3, slowness=slowness, student_bytes=(0, 0))
    plan = STRATEGIES["ddp"].plan(costs, [Span(0, 0, 10), Span(1, 0, 10)], 2)
    assert plan.predicted_rank_s == pytest.approx([10 * (1 + 2 + 2 + 2) / 2 * 2.0] * 2)


def test_among_equal_makespans_the_one_with_less_work_is_taken() -> None:
    costs = Costs((1.0, 1.0, 1.0), (90.0, 1.0, 1.0), (0,) * 4)
    plan = plan_replicate(costs, [Span(block, 0, 10) for block in range(3)], 3)
    assert sorted(plan.owners) == [(), (0,), (1, 2)], "a rank each would run the teacher once more"


def teacher_heavy(student_s: float = 1.0) -> tuple[Costs, list[Span]]:
    return Costs((5.0,) * 4, (student_s,) * 4, (10,) * 5), [Span(block, 0, 12) for block in range(4)]


def test_teacher_ranks_share_the_teacher_and_all_that_it_sends() -> None:
    costs, spans = teacher_heavy()
    priced = replace(costs, network=wire(0.01))
    plan = plan_broadcast(priced, spans, 4, 2)
    assert plan.teacher_ranks == 2
    assert plan.label == "broadcast with 2 teacher ranks"
    bytes_of = [12 * 10 * len(boundaries_of(plan.spans_of(rank))) for rank in range(plan.world_size)]
    for rank, owned in enumerate(plan.owners):
        sent = sum(size / 2 for other, size in enumerate(bytes_of) if other != rank) if rank < 2 else 0.0
        taught = 12 * 20 / 2 if rank < 2 else 0.0
        assert plan.predicted_rank_s[rank] == pytest.approx(12 * len(owned) + taught + 0.01 * sent)
    assert [plan.teaches(rank) for rank in range(4)] == [True, True, False, False]
    assert plan.taught_elsewhere(1) == {0, 1, 2, 3} - set(plan.owners[1])
    assert plan.taught_elsewhere(2) == frozenset()


def test_a_dear_teacher_gets_several_ranks_and_a_cheap_one_stays_alone() -> None:
    costs, spans = teacher_heavy()
    assert plan_teachers(costs, spans, 4).teacher_ranks == 4
    assert plan_teachers(costs, spans, 4).predicted_makespan_s == 12 * 6
    cheap, spans = teacher_heavy(student_s=100.0)
    assert plan_teachers(cheap, spans, 2).teacher_ranks == 1
    assert plan_teachers(costs, [], 4).teacher_ranks == 1


@settings(max_examples=40, deadline=None)
@given(instance=instances())
def test_choosing_the_number_of_teacher_ranks_never_costs_anything(instance: Instance) -> None:
    one = plan_broadcast(*instance).predicted_makespan_s
    chosen = plan_teachers(*instance)
    assert chosen.predicted_makespan_s <= one
    assert chosen == plan_broadcast(*instance, chosen.teacher_ranks)


def test_the_number_of_teacher_ranks_of_64_blocks_on_64_ranks_is_estimated_quickly() -> None:
    generator = np.random.default_rng(0)
    costs = Costs(tuple(generator.uniform(1, 5, 64)), tuple(generator.uniform(1, 9, 64)), (1000,) * 65)
    start = time.process_time()
    number = teacher_ranks_needed(costs, [Span(block, 0, 100) for block in range(64)], 64)
    assert time.process_time() - start < 1.0
    assert 10 < number < 40, "the teacher's share of all work is about a third"
