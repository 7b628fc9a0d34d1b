"""Groups of ranks that share out a batch: what that costs by hand, and how a relay of groups goes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.planning.costs import Costs, Span
from distill.planning.network import Link, Network
from distill.planning.placement.plans import plan_broadcast
from distill.planning.plan import Plan
from distill.planning.relay.groups import as_single_ranks, gradient_bytes, price_of_student, price_of_teacher
from distill.planning.relay.relay_plans import plan_groups, plan_relay
from distill.simulation.simulator import simulate

COSTS = Costs((1.0, 2.0, 1.0), (3.0, 20.0, 4.0), (0, 80, 40, 0), student_bytes=(10, 20, 30), batch_size=64)
SPANS = [Span(block, 0, 100) for block in range(3)]
FIXED = replace(COSTS, teacher_fixed_s=(0.5, 0.5, 0.5), student_fixed_s=(1.0, 1.0, 1.0))
IN_PAIRS = Network(
    within=Link(1e3, latency_s=0.001), between=Link(10.0, latency_s=0.009), hosts=(0, 0, 1, 1, 2, 2), own_adapters=True
)


def test_what_is_fixed_is_not_divided_and_gradients_go_round_the_ring() -> None:
    costs = replace(FIXED, network=IN_PAIRS)
    price = price_of_student(costs, 1, 4)  # neighbours of four ranks: two within a host, one between
    assert (price.shared, price.moved) == pytest.approx((1.0, 2 * 20 / 10))
    assert price.hop == pytest.approx(2 * (0.001 + 0.009 + 0.001) / 3)
    assert (price.computing_s(1), price.averaging_s(1)) == (0.0, 0.0)
    assert (price.computing_s(4), price.averaging_s(4)) == pytest.approx((0.75 * 1.0, 0.75 * 4.0 + 3 * price.hop))
    assert price_of_teacher(costs, 1).computing_s(2) == pytest.approx(0.25)
    free = price_of_student(COSTS, 1, 4)  # links without limit, and nothing fixed
    assert (free.computing_s(4), free.averaging_s(4)) == (0.0, 0.0)


def test_gradients_travel_behind_what_else_a_group_computes() -> None:
    pair = replace(Plan("relay", ((0, 1), ()), tuple(SPANS[:2]), 0.0, (0.0, 0.0), (0, 0)), groups=((0, 1),))
    costs = Costs((6.0, 2.0), (4.0, 8.0), (0, 0, 0), student_bytes=(10, 10))
    for bytes_per_s, step_s in ((10.0, 10.0), (2.0, 4.0 + 2 * 5.0)):  # half of 20 s; the heaviest alone and all bytes
        network = Network(within=Link(bytes_per_s))
        assert simulate(pair, replace(costs, network=network)).makespan_s == pytest.approx(100 * step_s)


def test_a_relay_of_groups_is_simulated_as_one_of_faster_ranks() -> None:
    plan = plan_groups(COSTS, SPANS, 8)
    assert plan.groups
    single, costs = as_single_ranks(plan, COSTS)
    sizes = [len(plan.group_of(rank)) for rank in range(8) if plan.owners[rank]]
    assert single.world_size == len(sizes) == sum(bool(owned) for owned in plan.owners)
    assert sum(costs.student_s) < sum(COSTS.student_s)
    found = simulate(plan, COSTS)
    assert found.busy_s == pytest.approx(plan.predicted_rank_s)
    assert max(plan.predicted_rank_s) <= found.makespan_s <= 1.05 * plan.predicted_makespan_s
    assert found.teacher_passes == 100
    passed_on = sum(COSTS.boundary_bytes[start] for start in set(plan.starts)) * 100
    assert found.bytes_sent == pytest.approx(passed_on + gradient_bytes(plan, COSTS))
    by_hand = sum(2 * (len(g) - 1) * COSTS.student_bytes[b] for g in plan.groups for b in plan.owners[g[0]])
    assert gradient_bytes(plan, COSTS) == 100 * by_hand


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 9.0), st.floats(0.1, 9.0)), min_size=1, max_size=6),
    st.integers(1, 12),
    st.floats(0.0, 0.05),
)
def test_groups_are_as_fast_as_predicted_and_never_faster_than_the_work_allows(
    blocks: list[tuple[float, float]], ranks: int, fixed: float
) -> None:
    teacher, student = (tuple(values) for values in zip(*blocks, strict=True))
    costs = Costs(
        teacher, student, (0,) * (len(blocks) + 1), (0,) * len(blocks),
        teacher_fixed_s=(fixed,) * len(blocks), student_fixed_s=(fixed,) * len(blocks),
    )  # fmt: skip
    spans = [Span(block, 0, 60) for block in range(len(blocks))]
    found = simulate(plan_groups(costs, spans, ranks), costs)
    work = 60 * (sum(teacher) + sum(student))
    assert work / ranks <= found.makespan_s * (1 + 1e-9)
    assert found.busy_s == pytest.approx(found.plan.predicted_rank_s)
    assert found.makespan_s <= max(found.busy_s) + 8 * (sum(teacher) + sum(student))
    assert found.makespan_s <= 1.01 * simulate(plan_relay(costs, spans, ranks), costs).makespan_s + 1e-6


def test_what_does_not_shrink_with_a_share_makes_large_groups_worth_less() -> None:
    free, fixed = (simulate(plan_groups(costs, SPANS, 24), costs).makespan_s for costs in (COSTS, FIXED))
    alone = simulate(plan_broadcast(COSTS, SPANS, 1), COSTS).makespan_s
    assert alone / free / 24 > 0.85
    assert alone / fixed / 24 < 0.7


def test_a_group_sends_on_no_faster_than_its_ranks_can() -> None:
    # 80 bytes a step behind block 0, ten bytes a second from each rank to another host
    costs = replace(COSTS, network=replace(IN_PAIRS, hosts=tuple(range(8))), student_bytes=(0, 0, 0))
    plan = plan_groups(costs, SPANS, 8)
    found = simulate(plan, costs)
    for first in [rank for rank in range(1, 8) if plan.owners[rank]]:
        before = plan.group_before(first)
        fewer = min(len(before), len(plan.group_of(first)))
        assert found.makespan_s >= 0.99 * 100 * costs.boundary_bytes[plan.starts[first]] / fewer / 10.0
