"""Ranges of blocks for groups of ranks: none found by trying everything is better."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.planning.costs import Costs, Span
from distill.planning.network import Link, Network
from distill.planning.plan import Plan
from distill.planning.relay.ranges import Range, RangeCosts, best_ranges
from distill.planning.relay.relay_plans import plan_groups, plan_relay

seconds = st.floats(0.0, 10.0, allow_nan=False).map(lambda value: round(value, 3))
positive = st.floats(0.1, 10.0, allow_nan=False).map(lambda value: round(value, 3))


def every_way(blocks: int, ranks: int, most: int) -> Iterator[list[Range]]:
    """All ways to cover the blocks by ranges on groups of consecutive ranks, some ranks idle."""

    def extend(start: int, first: int) -> Iterator[list[Range]]:
        if start == blocks:
            yield []
        for end, begin in itertools.product(range(start + 1, blocks + 1), range(first, ranks)):
            for size in range(1, min(most, ranks - begin) + 1):
                for rest in extend(end, begin + size):
                    yield [Range(start, end, begin, size), *rest]

    return extend(0, 0)


def slowest(costs: RangeCosts, slowness: list[float], ranges: list[Range]) -> float:
    return max(
        float(costs.seconds(r.ranks)[r.start, r.end]) * max(slowness[r.first : r.first + r.ranks]) for r in ranges
    )


def sums(by_block: list[float]) -> np.ndarray:
    total = np.cumsum([0.0, *by_block])
    return total[None, :] - total[:, None]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_ranges_are_faster(data: st.DataObject) -> None:
    blocks, ranks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    draw = lambda kind: data.draw(st.lists(kind, min_size=blocks, max_size=blocks))  # noqa: E731
    one = draw(positive)
    divided = sums(one)
    if blocks > 1 and data.draw(st.booleans()):
        divided[0, 1] = np.inf  # a range that is not allowed
    heaviest = np.array([[max(one[a:b], default=0.0) for b in range(blocks + 1)] for a in range(blocks + 1)])
    moved, hops = sums(draw(seconds)), sums(draw(st.sampled_from([0.0, 0.1, 1.0])))
    costs = RangeCosts(divided, sums(draw(seconds)), heaviest, moved, hops)
    most = data.draw(st.integers(1, 5))
    slowness = data.draw(
        st.one_of(st.just([1.0] * ranks), st.lists(st.sampled_from([1.0, 1.5, 3.0]), min_size=ranks, max_size=ranks))
    )
    found = best_ranges(costs, slowness, most=most)
    best = min(slowest(costs, slowness, ranges) for ranges in every_way(blocks, ranks, most))
    assert slowest(costs, slowness, found) == pytest.approx(best, rel=1e-9)
    assert [r.start for r in found] == [0, *(r.end for r in found[:-1])]
    assert found[-1].end == blocks
    assert all(a.first + a.ranks <= b.first for a, b in itertools.pairwise(found))
    assert all(1 <= r.ranks <= most for r in found)
    assert found[-1].first + found[-1].ranks <= ranks


def whole(blocks: int, steps: int = 100) -> list[Span]:
    return [Span(block, 0, steps) for block in range(blocks)]


def busy(plan: Plan) -> list[int]:
    return [rank for rank in range(plan.world_size) if plan.has_work(rank)]


def test_more_ranks_than_blocks_divide_all_the_work_that_gradients_leave_them() -> None:
    generator = np.random.default_rng(1)
    costs = Costs(
        tuple(generator.uniform(1, 2, 9)), tuple(generator.uniform(2, 6, 9)), (1000,) * 10,
        student_bytes=(1000,) * 9, network=Network(within=Link(bytes_per_s=1e5)), batch_size=64,
    )  # fmt: skip
    plan = plan_groups(costs, whole(9), 32)
    alone = 100 * (sum(costs.teacher_s) + sum(costs.student_s))
    assert alone / max(plan.predicted_rank_s) > 0.9 * 32
    assert alone / max(plan_relay(costs, whole(9), 32).predicted_rank_s) < 9
    assert len(busy(plan)) > 28
    assert max(map(len, plan.groups)) <= 64
    for rank in busy(plan):
        group = plan.group_of(rank)
        assert plan.trained_by(rank) == plan.spans_of(group[0])
        assert plan.starts[rank] == plan.starts[group[0]]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.label == "relay in groups"


def test_dear_gradients_leave_a_relay_of_single_ranks() -> None:
    costs = Costs((1.0,) * 4, (3.0,) * 4, (0,) * 5, student_bytes=(1000,) * 4, network=Network(within=Link(1.0)))
    plan = plan_groups(costs, whole(4), 8)
    assert not plan.groups
    assert plan.predicted_makespan_s == plan_relay(costs, whole(4), 8).predicted_makespan_s


def test_a_group_is_no_larger_than_a_batch() -> None:
    costs = Costs((1.0,), (3.0,), (0,) * 2, batch_size=3)
    plan = plan_groups(costs, whole(1), 8)
    assert plan.groups == ((0, 1, 2),)
    assert busy(plan) == [0, 1, 2]


def test_ranges_before_and_behind_a_group() -> None:
    spans = tuple(whole(3, 5))
    plan = Plan(
        "relay", ((0,), (), (1,), (), (), (2,)), spans, 1.0, (1.0,) * 6, (0, 0, 1, 1, 1, 2), groups=((0, 1), (2, 3, 4))
    )
    assert [plan.group_before(rank) for rank in range(6)] == [(), (), (0, 1), (0, 1), (0, 1), (2, 3, 4)]
    assert [plan.group_after(rank) for rank in range(6)] == [(2, 3, 4), (2, 3, 4), (5,), (5,), (5,), ()]
    assert [plan.units_behind(rank) for rank in (1, 3, 5)] == [{1, 2}, {2}, set()]
    assert [span.unit for rank in range(6) for span in plan.trained_by(rank)] == [0, 0, 1, 1, 1, 2]
    assert all(plan.teaches(rank) and plan.has_work(rank) for rank in range(6))


@pytest.mark.parametrize("latency_s", [0.0, 1e-5])
def test_two_hundred_blocks_on_a_thousand_ranks_are_grouped_in_two_seconds(latency_s: float) -> None:
    generator = np.random.default_rng(0)
    costs = Costs(
        tuple(generator.uniform(1, 5, 200)), tuple(generator.uniform(1, 9, 200)), (1000,) * 201,
        student_bytes=tuple(int(size) for size in generator.uniform(1e3, 1e5, 200)),
        network=Network(within=Link(1e9, latency_s, 1e-9)), batch_size=128,
    )  # fmt: skip
    start = time.process_time()
    plan = plan_groups(costs, whole(200), 1024)
    assert time.process_time() - start < 2.0
    assert max(plan.predicted_rank_s) < 1.05 * 100 * (sum(costs.teacher_s) + sum(costs.student_s)) / 1024
