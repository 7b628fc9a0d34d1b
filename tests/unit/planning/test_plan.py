"""Placement of blocks on ranks, and the arithmetic of the prediction that comes with every plan."""

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.planning.costs import Costs, Span, teacher_seconds
from distill.planning.network import Link, Network
from distill.planning.placement.plans import plan_broadcast
from distill.planning.placement.problems import broadcast_problem
from distill.planning.plan import Plan
from distill.planning.unit import boundaries_of


def priced(sender_s_per_byte: float) -> Network:
    """Ranks of one host, where a byte costs its sender so much."""
    return Network(within=Link(sender_s_per_byte=sender_s_per_byte))


def costs(teacher: list[float], student: list[float], *, wire: float = 0.0, size: int = 1000) -> Costs:
    return Costs(tuple(teacher), tuple(student), (size,) * (len(teacher) + 1), network=priced(wire))


def whole(budget: int, blocks: int) -> list[Span]:
    return [Span(block, 0, budget) for block in range(blocks)]


def optimum(problem: Costs, spans: list[Span], world_size: int) -> float:
    """The smallest makespan over every placement, tried one by one."""
    arithmetic = broadcast_problem(problem, spans, world_size)
    return min(
        max(arithmetic.seconds(dict(zip([s.unit for s in spans], ranks, strict=True))))
        for ranks in itertools.product(range(world_size), repeat=len(spans))
    )


seconds = st.floats(0.0, 10.0, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Costs, list[Span], int]:
    blocks = draw(st.integers(1, 6))
    per_block = st.lists(seconds, min_size=blocks, max_size=blocks)
    sizes = draw(st.lists(st.integers(0, 1000), min_size=blocks + 1, max_size=blocks + 1))
    wire = draw(st.sampled_from([0.0, 1e-3]))
    firsts = draw(st.lists(st.integers(0, 9), min_size=blocks, max_size=blocks))
    problem = Costs(tuple(draw(per_block)), tuple(draw(per_block)), tuple(sizes), network=priced(wire))
    return problem, [Span(block, first, 10) for block, first in enumerate(firsts)], draw(st.integers(1, 3))


class TestPlacement:
    @settings(max_examples=60, deadline=None)
    @given(problems())
    def test_makespan_of_small_problems_is_the_optimum(self, problem: tuple[Costs, list[Span], int]) -> None:
        plan = plan_broadcast(*problem)
        assert plan.predicted_makespan_s <= optimum(*problem) * (1 + 1e-9) + 1e-9

    @settings(max_examples=60, deadline=None)
    @given(problems())
    def test_every_block_has_exactly_one_owner(self, problem: tuple[Costs, list[Span], int]) -> None:
        _, spans, world_size = problem
        plan = plan_broadcast(*problem)
        assert plan.world_size == world_size
        assert sorted(block for owned in plan.owners for block in owned) == [span.unit for span in spans]
        assert sorted(s.unit for rank in range(world_size) for s in plan.spans_of(rank)) == [s.unit for s in spans]

    @settings(max_examples=60, deadline=None)
    @given(problems())
    def test_predicted_seconds_are_those_of_the_placement(self, problem: tuple[Costs, list[Span], int]) -> None:
        price, spans, world_size = problem
        plan = plan_broadcast(*problem)
        placement = {block: rank for rank, owned in enumerate(plan.owners) for block in owned}
        assert plan.predicted_rank_s == tuple(broadcast_problem(price, spans, world_size).seconds(placement))
        assert plan.predicted_makespan_s == max(plan.predicted_rank_s)

    def test_seven_blocks_on_three_ranks_are_placed_optimally(self) -> None:
        # Largest-first alone reaches 11 (5+3+3, 5+3, 4+4); 5+4, 5+4, 3+3+3 is even.
        problem = costs([0.0] * 7, [5.0, 5.0, 4.0, 4.0, 3.0, 3.0, 3.0])
        plan = plan_broadcast(problem, whole(1, 7), 3)
        assert plan.predicted_makespan_s == 9.0 == optimum(problem, whole(1, 7), 3)

    def test_one_rank_gets_everything_and_pays_for_teacher_and_students(self) -> None:
        plan = plan_broadcast(costs([1.0, 2.0], [3.0, 4.0], wire=1.0), whole(10, 2), 1)
        assert plan.owners == ((0, 1),)
        assert plan.predicted_makespan_s == 10 * (1 + 2 + 3 + 4)

    def test_with_more_ranks_than_blocks_some_ranks_own_nothing(self) -> None:
        plan = plan_broadcast(costs([1.0, 1.0], [5.0, 5.0]), whole(10, 2), 5)
        assert sorted(len(owned) for owned in plan.owners) == [0, 0, 0, 1, 1]
        assert plan.predicted_makespan_s == 50.0  # either student alone; the teacher's 20 s fit beside them
        assert plan.spans_of(next(r for r in range(5) if not plan.owners[r])) == ()

    def test_rank_0_gets_less_by_what_the_teacher_costs(self) -> None:
        plan = plan_broadcast(costs([1.0] * 4, [4.0] * 4), whole(1, 4), 2)
        assert len(plan.owners[0]) == 2  # 4 + 8 against 8; three and one would be 4 + 4 against 12: equal
        plan = plan_broadcast(costs([2.0] * 4, [4.0] * 4), whole(1, 4), 2)
        assert len(plan.owners[0]) == 1  # 8 + 4 against 12, not 8 + 8
        assert plan.predicted_rank_s == (12.0, 12.0)

    def test_costly_wire_keeps_blocks_on_rank_0(self) -> None:
        cheap = plan_broadcast(costs([0.1] * 2, [1.0] * 2), whole(10, 2), 2)
        costly = plan_broadcast(costs([0.1] * 2, [1.0] * 2, wire=1e-2), whole(10, 2), 2)
        assert [len(owned) for owned in cheap.owners] == [1, 1]
        assert costly.owners == ((0, 1), ())

    def test_neighbours_share_a_rank_where_that_saves_traffic_and_no_time(self) -> None:
        plan = plan_broadcast(costs([0.0] * 4, [1.0] * 4, wire=1e-6), whole(10, 4), 2)
        assert sorted(map(sorted, plan.owners)) in ([[0, 1], [2, 3]], [[0, 3], [1, 2]])
        assert len(boundaries_of(plan.spans_of(1))) == 3

    def test_no_block_left_to_train_is_a_plan_of_nothing(self) -> None:
        plan = plan_broadcast(costs([1.0], [1.0]), [], 2)
        assert (plan.owners, plan.predicted_makespan_s) == (((), ()), 0.0)

    def test_the_same_problem_gives_the_same_plan(self) -> None:
        problem = costs([1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0], wire=1e-6)
        assert plan_broadcast(problem, whole(5, 5), 3) == plan_broadcast(problem, whole(5, 5), 3)

    def test_many_blocks_resumed_at_different_steps_are_placed_well_and_at_once(self) -> None:
        # Beyond exact search: largest-first is at most 4/3 of the optimum (Graham 1969), and a job waits for its plan.
        student = [1.0 + (7 * block % 13) for block in range(54)]
        spans = [Span(block, block, 200) for block in range(54)]
        started = time.process_time()
        plan = plan_broadcast(costs([0.0] * 54, student), spans, 8)
        assert time.process_time() - started < 4.0
        assert plan.predicted_makespan_s <= 4 / 3 * sum(student[s.unit] * s.steps for s in spans) / 8


class TestVGG:
    # Seconds of an epoch by layer on one GPU, of Blakeney et al.'s VGG16 on CIFAR-10 (their published layer times,
    # column vgg_bin_bs256_fixed__1gpu).
    LAYERS = (
        393.979, 649.666, 307.605, 398.694, 241.988, 256.383, 252.185, 232.623, 234.556, 244.167, 233.823, 240.424,
        234.429,
    )  # fmt: skip

    def test_published_layer_times_are_packed_optimally(self) -> None:
        # The optimum was made by dynamic programming over all 8192 subsets of the layers.
        plan = plan_broadcast(costs([0.0] * 13, list(self.LAYERS)), whole(1, 13), 4)
        assert plan.predicted_makespan_s == pytest.approx(1025.296)


class TestTeacherSeconds:
    def test_every_batch_is_paid_once_for_all_blocks(self) -> None:
        assert teacher_seconds(costs([1.0, 2.0, 4.0], [0.0] * 3), whole(10, 3)) == 70.0

    def test_the_teacher_runs_only_as_deep_as_the_deepest_block(self) -> None:
        assert teacher_seconds(costs([1.0, 2.0, 4.0], [0.0] * 3), [Span(1, 0, 10)]) == 30.0

    def test_batches_that_no_block_needs_are_not_paid(self) -> None:
        # Steps 2 to 4 for block 0, 7 to 9 for block 1: 3 * 1 + 3 * (1 + 2).
        spans = [Span(0, 2, 5), Span(1, 7, 10)]
        assert teacher_seconds(costs([1.0, 2.0], [0.0] * 2), spans) == 12.0

    def test_depth_follows_the_blocks_that_train_on_each_batch(self) -> None:
        # Steps 0 to 3 serve block 0 alone, 4 to 9 both: 4 * 1 + 6 * 3.
        spans = [Span(0, 0, 10), Span(1, 4, 10)]
        assert teacher_seconds(costs([1.0, 2.0], [0.0] * 2), spans) == 22.0

    def test_a_finished_span_costs_nothing(self) -> None:
        assert teacher_seconds(costs([1.0, 2.0], [0.0] * 2), [Span(1, 10, 10)]) == 0.0

    @settings(max_examples=50, deadline=None)
    @given(problems())
    def test_equals_the_sum_over_single_batches(self, problem: tuple[Costs, list[Span], int]) -> None:
        price, spans, _ = problem
        by_batch = math.fsum(
            sum(price.teacher_s[: 1 + max(s.unit for s in spans if s.first <= step < s.budget)])
            for step in range(10)
            if any(s.first <= step < s.budget for s in spans)
        )
        assert teacher_seconds(price, spans) == pytest.approx(by_batch)


class TestRankSeconds:
    def test_the_wire_costs_the_sender_and_a_shared_boundary_travels_once(self) -> None:
        price = Costs((0.0,) * 3, (0.0,) * 3, (1, 10, 100, 1000), network=priced(1.0))
        spans = whole(2, 3)
        assert broadcast_problem(price, spans, 2).seconds({0: 0, 1: 1, 2: 1}) == [2 * 1110.0, 0.0]

    def test_steps_already_done_are_not_counted(self) -> None:
        price = costs([1.0, 1.0], [3.0, 5.0])
        resumed = broadcast_problem(price, [Span(0, 8, 10), Span(1, 6, 10)], 2)
        assert resumed.seconds({0: 0, 1: 1}) == [8.0 + 2 * 3.0, 4 * 5.0]


class TestPlan:
    def test_json_reads_back_equal(self) -> None:
        plan = plan_broadcast(costs([1.0] * 3, [0.1, 0.7, 0.3]), [Span(0, 0, 10), Span(1, 3, 10), Span(2, 9, 10)], 2)
        assert Plan.from_json(plan.to_json()) == plan

    def test_spans_of_a_rank_are_in_block_order(self) -> None:
        plan = Plan("broadcast", ((2, 0), (1,)), tuple(whole(5, 3)), 0.0, (0.0, 0.0))
        assert [span.unit for span in plan.spans_of(0)] == [0, 2]

    def test_boundaries_shared_by_neighbours_are_named_once(self) -> None:
        assert boundaries_of([Span(1, 0, 9), Span(2, 0, 9), Span(5, 0, 9), Span(9, 0, 9, 1, 6)]) == {1, 2, 3, 5, 6}


def test_the_start_of_decoding_counts_once_or_for_every_pass_of_a_rank() -> None:
    owners = ((0, 1), (2,))
    together = Plan("broadcast", owners, tuple(whole(5, 3)), 10.0, (10.0, 8.0)).started_in(2.0)
    assert (together.predicted_makespan_s, together.start_s) == (12.0, 2.0)
    one_by_one = Plan("layerwise", owners, tuple(whole(5, 3)), 10.0, (10.0, 8.0)).started_in(2.0)
    assert (one_by_one.predicted_makespan_s, one_by_one.start_s) == (14.0, 4.0)
    assert Plan.from_json(one_by_one.to_json()) == one_by_one
    nothing_left = Plan("broadcast", ((), ()), (), 0.0, (0.0, 0.0))
    assert nothing_left.started_in(2.0).predicted_makespan_s == 0.0
