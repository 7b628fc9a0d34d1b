"""Plans over links: who sends what over which line, and what that adds to the prediction, as in the simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.planning.costs import Costs, Span
from distill.planning.network import Flow, Link, Network
from distill.planning.placement.plans import plan_broadcast
from distill.planning.plan import STRATEGIES, Plan
from distill.planning.relay.relay_plans import plan_groups, plan_relay
from distill.planning.strategies.choice import rank_plans
from distill.planning.traffic import busiest_line_s, over_links
from distill.simulation.simulator import simulate

COSTS = Costs((1.0, 1.0, 1.0, 1.0), (4.0, 4.0, 4.0, 4.0), (40, 30, 20, 10, 5), student_bytes=(8,) * 4)
STEPS = 50
SPANS = tuple(Span(block, 0, STEPS) for block in range(4))


def flows_of(plan: Plan, costs: Costs) -> list[Flow]:
    return plan.how.flows(plan, costs)


def between(bytes_per_s: float, *, latency_s: float = 0.0, hosts: tuple[int, ...] = (0, 1)) -> Costs:
    """The costs on hosts joined by such a link."""
    return replace(COSTS, network=Network(between=Link(bytes_per_s, latency_s), hosts=hosts))


def plan(strategy: str, owners: tuple[tuple[int, ...], ...], starts: tuple[int, ...] = ()) -> Plan:
    return Plan(strategy, owners, SPANS, 100.0, (100.0,) * len(owners), starts)


def test_a_broadcast_sends_every_boundary_that_another_rank_needs_once() -> None:
    placed = plan("broadcast", ((0,), (1, 3), (2,)))
    assert flows_of(placed, COSTS) == [Flow(0, 1, STEPS * (30 + 20 + 10 + 5), STEPS), Flow(0, 2, STEPS * 30, STEPS)]
    shared = flows_of(replace(placed, teacher_ranks=2), COSTS)
    assert [(f.source, f.target) for f in shared] == [(1, 0), (0, 1), (0, 2), (1, 2)]
    assert sum(f.size for f in shared if f.target == 2) == STEPS * 30


def test_a_relay_sends_one_boundary_a_hop_and_a_group_its_rows() -> None:
    placed = plan("relay", ((0, 1), (), (2, 3), ()), (0, 0, 2, 2))
    assert flows_of(placed, COSTS) == [Flow(0, 2, STEPS * 20, STEPS)]
    grouped = replace(placed, owners=((0, 1), (2, 3), ()), starts=(0, 2, 2), groups=((1, 2),))
    assert flows_of(grouped, COSTS) == [Flow(0, 1, STEPS * 10, STEPS), Flow(0, 2, STEPS * 10, STEPS)]
    assert flows_of(plan("replicate", ((0, 1), (2, 3))), COSTS) == []


def test_all_that_leaves_a_host_shares_its_line_and_what_stays_does_not() -> None:
    placed = plan("broadcast", ((0,), (1,), (2,), (3,)))  # sends 50, 30 and 15 bytes a step
    assert busiest_line_s(placed, between(10.0, hosts=(0, 0, 1, 2))) == STEPS * (30 + 15) / 10
    assert busiest_line_s(placed, between(10.0, hosts=(0, 1, 1, 1))) == STEPS * (50 + 30 + 15) / 10
    assert busiest_line_s(placed, between(10.0, hosts=(0, 0, 0, 0))) == 0.0


def test_the_longer_of_computing_and_sending_counts_and_one_batch_of_the_other() -> None:
    placed = plan("relay", ((0, 1), (2, 3)), (0, 2))  # 20 bytes a step
    assert over_links(placed, between(100.0, latency_s=3.0)).predicted_makespan_s == pytest.approx(100 + 0.2 + 3)
    assert over_links(placed, between(2.0)).predicted_makespan_s == pytest.approx(STEPS * 10 + 100 / STEPS)
    assert over_links(placed, COSTS) == placed


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([plan_broadcast, plan_relay, plan_groups]), st.floats(0.5, 200.0), st.integers(2, 3))
def test_predictions_over_links_are_those_of_the_simulation(planner, bytes_per_s: float, ranks: int) -> None:  # type: ignore[no-untyped-def]
    costs = between(bytes_per_s, hosts=tuple(range(ranks)))
    planned = planner(costs, SPANS, ranks)
    assert planned.predicted_makespan_s == pytest.approx(simulate(planned, costs).makespan_s, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 100.0))
def test_a_broadcast_over_a_slow_link_sends_less_where_that_is_faster(bytes_per_s: float) -> None:
    costs = between(bytes_per_s)
    planned = plan_broadcast(costs, SPANS, 2)
    blind = over_links(plan_broadcast(COSTS, SPANS, 2), costs)
    assert planned.predicted_makespan_s <= blind.predicted_makespan_s
    alone = STEPS * 20.0  # rank 0 can always do it all itself
    assert planned.predicted_makespan_s <= alone


def test_a_relay_is_cut_where_its_boundary_comes_through() -> None:
    assert plan_relay(between(100.0), SPANS, 2).starts == (0, 2)
    assert plan_relay(between(0.9), SPANS, 2).starts == (0, 3), "the boundary in the middle would take twice as long"


def test_gradients_go_over_the_slowest_link_while_the_next_teacher_prefix_computes() -> None:
    here = STRATEGIES["ddp"].plan(COSTS, SPANS, 2).predicted_makespan_s
    there = STRATEGIES["ddp"].plan(between(4.0, latency_s=0.1), SPANS, 2).predicted_makespan_s
    averaging_s, prefixes_s = 8 / 4.0 + 2 * 0.1, [0.5, 1.0, 1.5, 2.0]
    assert there - here == pytest.approx(STEPS * sum(averaging_s - prefix for prefix in prefixes_s))
    assert STRATEGIES["ddp"].plan(between(400.0), SPANS, 2).predicted_makespan_s == here


def test_the_slower_the_link_the_less_the_best_strategy_sends() -> None:
    asked = [STRATEGIES[name] for name in ("broadcast", "replicate", "relay")]
    chosen = [rank_plans(asked, between(speed), SPANS, 2)[0] for speed in (1e6, 2.0, 0.05)]
    assert chosen[-1].strategy == "replicate"
    sent = [sum(flow.size for flow in flows_of(one, COSTS)) for one in chosen]
    assert sent == sorted(sent, reverse=True)
    assert sent[0] > 0
