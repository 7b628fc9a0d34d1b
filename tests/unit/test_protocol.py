"""Addresses, feeds and the schedule of teacher passes, on imagined ranks with a clock of their own."""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.plan import Span
from distill.protocol import TRAIN, Address, Checks, Feed, Schedule, Service, Turns

NEVER = Checks()


def walk(feed: Feed) -> list[Address]:
    """Every address that the feed asks for, served one by one."""
    seen = []
    while feed.cursor is not None:
        seen.append(feed.cursor)
        feed.advance()
    return seen


class TestAddress:
    def test_the_looks_after_a_step_come_between_it_and_the_next_step(self) -> None:
        shuffled = [Address(4), Address(3, 1), Address(3), Address(3, 0)]
        assert sorted(shuffled) == [Address(3), Address(3, 0), Address(3, 1), Address(4)]

    def test_a_training_batch_is_no_look(self) -> None:
        assert Address(3).is_training
        assert Address(3).check == TRAIN
        assert not Address(3, 0).is_training


class TestChecks:
    def test_without_checks_training_batches_follow_each_other(self) -> None:
        assert NEVER.after(Address(0)) == Address(1)

    def test_after_the_due_step_come_its_looks_and_then_the_next_step(self) -> None:
        checks = Checks(every=2, batches=2)
        address, seen = Address(0), []
        for _ in range(8):
            seen.append(tuple(address))
            address = checks.after(address)
        assert seen == [(0, TRAIN), (1, TRAIN), (1, 0), (1, 1), (2, TRAIN), (3, TRAIN), (3, 0), (3, 1)]

    def test_looks_of_no_batches_are_none(self) -> None:
        assert Checks(every=1, batches=0).after(Address(0)) == Address(1)


class TestFeed:
    def test_walks_from_the_first_step_to_the_budget(self) -> None:
        assert walk(Feed(0, [Span(4, 2, 5)], NEVER)) == [Address(2), Address(3), Address(4)]

    def test_without_blocks_there_is_nothing_to_serve(self) -> None:
        assert Feed(0, [], NEVER).cursor is None
        assert Feed(0, [Span(1, 5, 5)], NEVER).cursor is None

    def test_blocks_join_at_their_own_first_step(self) -> None:
        feed = Feed(0, [Span(1, 0, 3), Span(7, 2, 3)], NEVER)
        assert [feed.blocks_at(address) for address in walk(feed)] == [(1,), (1,), (1, 7)]

    def test_a_gap_that_no_block_needs_is_skipped(self) -> None:
        assert walk(Feed(0, [Span(0, 0, 2), Span(1, 10, 11)], NEVER)) == [Address(0), Address(1), Address(10)]

    def test_boundary_shared_by_neighbours_is_served_once(self) -> None:
        feed = Feed(0, [Span(1, 0, 1), Span(2, 0, 1), Span(5, 0, 1)], NEVER)
        assert sorted(feed.boundaries_at(Address(0))) == [1, 2, 3, 5, 6]

    def test_looks_are_served_after_due_steps_but_not_after_the_last_step(self) -> None:
        addresses = walk(Feed(0, [Span(0, 0, 4)], Checks(every=2, batches=2)))
        assert addresses == [Address(0), Address(1), Address(1, 0), Address(1, 1), Address(2), Address(3)]

    def test_only_blocks_that_go_on_training_look(self) -> None:
        feed = Feed(0, [Span(0, 0, 2), Span(3, 0, 4)], Checks(every=2, batches=1))
        assert feed.blocks_at(Address(1)) == (0, 3)
        assert feed.blocks_at(Address(1, 0)) == (3,)

    def test_a_block_that_joins_later_does_not_look_earlier(self) -> None:
        feed = Feed(0, [Span(0, 0, 9), Span(3, 2, 9)], Checks(every=2, batches=1))
        assert feed.blocks_at(Address(1, 0)) == (0,)
        assert feed.blocks_at(Address(3, 0)) == (0, 3)

    def test_finishing_a_block_in_the_middle_shrinks_the_boundaries(self) -> None:
        feed = Feed(0, [Span(0, 0, 9), Span(5, 0, 9)], NEVER)
        feed.advance()
        feed.finish(5)
        assert feed.cursor == Address(1)
        assert feed.boundaries_at(Address(1)) == {0, 1}

    def test_finishing_the_last_block_ends_the_feed(self) -> None:
        feed = Feed(0, [Span(0, 0, 9)], NEVER)
        feed.finish(0)
        assert feed.cursor is None
        assert walk(feed) == []

    def test_finishing_a_block_moves_to_where_the_next_one_starts(self) -> None:
        feed = Feed(0, [Span(0, 0, 9), Span(1, 6, 9)], NEVER)
        feed.finish(0)
        assert feed.cursor == Address(6)

    def test_finishing_in_the_middle_of_a_look_skips_the_rest_of_it(self) -> None:
        feed = Feed(0, [Span(0, 0, 9), Span(1, 2, 9)], Checks(every=2, batches=2))
        for _ in range(3):
            feed.advance()
        assert feed.cursor == Address(1, 1)
        feed.finish(0)
        assert feed.cursor == Address(2)

    def test_finishing_a_block_of_another_rank_changes_nothing(self) -> None:
        feed = Feed(0, [Span(0, 0, 9)], NEVER)
        feed.finish(3)
        assert feed.cursor == Address(0)


def schedule_of(ranks: int, *, budget: int = 100, patience: float = 2.0) -> Schedule:
    return Schedule([Feed(rank, [Span(rank, 0, budget)], NEVER) for rank in range(ranks)], patience=patience)


def serve_all(schedule: Schedule, ranks: set[int], *, steps: int, now: float = 0.0) -> float:
    """Serve everybody for some steps of one second each, so that the schedule knows how long a step takes."""
    for _ in range(steps):
        service = schedule.choose(ranks, now)
        assert service is not None
        assert set(service.ranks) == ranks
        now += 1.0
        schedule.served(service, now)
    return now


class TestSchedule:
    def test_one_pass_serves_everyone_who_is_ready(self) -> None:
        assert schedule_of(3).choose({0, 1, 2}, 0.0) == Service(Address(0), (0, 1, 2))

    def test_waits_for_a_rank_without_a_slot(self) -> None:
        schedule = schedule_of(3)
        now = serve_all(schedule, {0, 1, 2}, steps=3)
        assert schedule.choose({0, 1}, now) is None
        assert schedule.choose({0, 1}, now + 1.0) is None
        assert schedule.choose({0, 1, 2}, now + 1.5) == Service(Address(3), (0, 1, 2))

    def test_waits_without_end_where_nobody_is_ready(self) -> None:
        schedule = schedule_of(2)
        now = serve_all(schedule, {0, 1}, steps=3)
        assert schedule.choose(set(), now) is None
        assert schedule.choose(set(), now + 1e6) is None

    def test_a_rank_out_of_patience_is_left_behind_and_then_served_alone(self) -> None:
        schedule = schedule_of(3)
        now = serve_all(schedule, {0, 1, 2}, steps=3)
        assert schedule.choose({0, 1}, now) is None
        service = schedule.choose({0, 1}, now + 2.5)
        assert service == Service(Address(3), (0, 1))
        schedule.served(service, now + 3.5)
        assert schedule.choose({0, 1}, now + 3.5) == Service(Address(4), (0, 1))
        schedule.served(Service(Address(4), (0, 1)), now + 4.5)
        assert schedule.choose({0, 1, 2}, now + 4.5) == Service(Address(3), (2,))

    def test_a_rank_that_has_caught_up_is_waited_for_again(self) -> None:
        schedule = schedule_of(2)
        now = serve_all(schedule, {0, 1}, steps=3)
        assert schedule.choose({0}, now) is None
        for address in (Address(3), Address(4)):
            service = schedule.choose({0}, now + 2.5)
            assert service == Service(address, (0,))
            schedule.served(service, now + 3.5)
        for address in (Address(3), Address(4)):
            service = schedule.choose({0, 1}, now + 4.5)
            assert service == Service(address, (1,))
            schedule.served(service, now + 5.5)
        assert schedule.choose({0, 1}, now + 5.5) == Service(Address(5), (0, 1))
        assert schedule.choose({0}, now + 5.5) is None

    def test_ranks_that_start_at_different_steps_share_what_they_can(self) -> None:
        schedule = Schedule([Feed(0, [Span(0, 0, 4)], NEVER), Feed(1, [Span(1, 2, 4)], NEVER)])
        served = []
        while not schedule.finished:
            service = schedule.choose({0, 1}, float(len(served)))
            assert service is not None
            served.append(service.ranks)
            schedule.served(service, float(len(served)))
        assert served == [(0,), (0,), (0, 1), (0, 1)]

    def test_finishing_the_blocks_of_a_rank_takes_it_out(self) -> None:
        schedule = schedule_of(2)
        schedule.finish(1)
        assert schedule.choose({0, 1}, 0.0) == Service(Address(0), (0,))
        assert not schedule.finished

    def test_finishing_every_block_ends_the_stream(self) -> None:
        schedule = schedule_of(2)
        schedule.finish(0)
        schedule.finish(1)
        assert schedule.finished
        assert schedule.choose({0, 1}, 0.0) is None

    def test_a_rank_that_was_waited_for_and_finishes_is_no_longer_waited_for(self) -> None:
        schedule = schedule_of(2)
        now = serve_all(schedule, {0, 1}, steps=3)
        assert schedule.choose({0}, now) is None
        schedule.finish(1)
        assert schedule.choose({0}, now) == Service(Address(3), (0,))


@dataclass
class Outcome:
    """When each rank had trained on its last batch, and how many teacher passes that took."""

    ended: dict[int, float] = field(default_factory=dict)
    passes: int = 0
    seen: dict[int, list[Address]] = field(default_factory=dict)


def simulate(
    seconds: dict[int, float], *, budget: int, teacher_s: float = 0.1, window: int = 4, wake_s: float = 0.05
) -> Outcome:
    """Ranks that take `seconds[rank]` a step (rank 0 in line with the teacher), each with `window` slots for batches
    that are under way, and a schedule that is asked whenever a slot becomes free, and every `wake_s`."""
    schedule = Schedule([Feed(rank, [Span(rank, 0, budget)], NEVER) for rank in seconds])
    outcome = Outcome(seen={rank: [] for rank in seconds})
    busy: dict[int, deque[float]] = {rank: deque() for rank in seconds}  # when each batch under way will be done
    now = 0.0
    while not schedule.finished:
        for queue in busy.values():
            while queue and queue[0] <= now:
                queue.popleft()
        ready = {rank for rank in seconds if rank == 0 or len(busy[rank]) < window}
        service = schedule.choose(ready, now)
        if service is None:
            freed = [queue[0] for queue in busy.values() if queue]
            now = min([now + wake_s, *freed])
            continue
        assert set(service.ranks) <= ready
        now += teacher_s
        outcome.passes += 1
        schedule.served(service, now)
        for rank in service.ranks:
            outcome.seen[rank].append(service.address)
            if rank == 0:
                now += seconds[0]
                outcome.ended[0] = now
            else:
                start = max([now, *busy[rank]])
                busy[rank].append(start + seconds[rank])
                outcome.ended[rank] = start + seconds[rank]
    return outcome


class TestSimulatedRanks:
    @pytest.mark.parametrize(
        "seconds",
        [{0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.61, 2: 0.63}, {0: 0.3, 1: 0.9}, {0: 0.9, 1: 0.1}, {1: 1.0, 2: 1.3}],
        ids=str,
    )
    def test_every_rank_sees_every_batch_once_and_in_order(self, seconds: dict[int, float]) -> None:
        outcome = simulate(seconds, budget=50)
        assert all(seen == [Address(step) for step in range(50)] for seen in outcome.seen.values())

    @pytest.mark.parametrize(
        "seconds",
        [
            {0: 0.5, 1: 0.6},
            {0: 0.5, 1: 0.62, 2: 0.65},
            {0: 0.45, 1: 0.6, 2: 0.6, 3: 0.7},
            {1: 1.0, 2: 1.1},
            {1: 1.0, 2: 1.1, 3: 1.2},
        ],
        ids=str,
    )
    def test_ranks_of_about_equal_speed_cost_almost_no_extra_passes(self, seconds: dict[int, float]) -> None:
        assert simulate(seconds, budget=100).passes <= 1.02 * 100

    @pytest.mark.parametrize("slow", [{3: 6.0}, {3: 6.0, 4: 9.0}], ids=str)
    @pytest.mark.parametrize("fast", [{0: 0.5, 1: 0.6, 2: 0.5}, {1: 0.6, 2: 0.5}], ids=str)
    def test_a_rank_ten_times_slower_does_not_delay_the_others(
        self, fast: dict[int, float], slow: dict[int, float]
    ) -> None:
        alone = simulate(fast, budget=100)
        together = simulate(fast | slow, budget=100)
        for rank in fast:
            assert together.ended[rank] <= 1.3 * alone.ended[rank]
        for rank, pace in slow.items():  # it trains without a pause from its first batch to its last
            assert together.ended[rank] <= 1.1 * 100 * pace

    def test_a_slow_rank_costs_at_most_a_pass_of_its_own_for_each_of_its_batches(self) -> None:
        assert 100 < simulate({0: 0.5, 1: 6.0}, budget=100).passes <= 2 * 100

    def test_others_stay_together_while_a_slow_rank_is_behind(self) -> None:
        # 3 x 100 would be a pass for everybody alone.
        assert simulate({0: 0.5, 1: 0.6, 2: 0.55, 3: 6.0}, budget=100).passes <= 2 * 100

    def test_the_teachers_own_rank_is_never_left_behind(self) -> None:
        schedule = Schedule([Feed(rank, [Span(rank, 0, 9)], NEVER) for rank in range(2)], home=0)
        now = serve_all(schedule, {0, 1}, steps=3)
        assert schedule.choose({1}, now) is None
        assert schedule.choose({1}, now + 1e6) is None
        assert schedule.choose({0, 1}, now + 1e6) == Service(Address(3), (0, 1))


class TestTurns:
    def test_every_batch_has_one_teacher_and_looks_are_spread_too(self) -> None:
        turns = Turns(3)
        assert [turns.teacher_of(Address(step)) for step in range(7)] == [0, 1, 2, 0, 1, 2, 0]
        assert [turns.teacher_of(Address(5, check)) for check in range(4)] == [0, 1, 2, 0]
        assert Turns().teacher_of(Address(11, 2)) == 0

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 4),
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=4),
        st.sampled_from([NEVER, Checks(every=2, batches=3), Checks(every=3, batches=1)]),
    )
    def test_the_turns_of_all_teachers_together_are_all_that_a_rank_needs(
        self, teacher_ranks: int, lengths: list[tuple[int, int]], checks: Checks
    ) -> None:
        turns = Turns(teacher_ranks)
        spans = [Span(block, first, first + steps) for block, (first, steps) in enumerate(lengths)]
        shares = [
            walk(Feed(0, spans, checks, of=lambda address, one=teacher: turns.teacher_of(address) == one))
            for teacher in range(teacher_ranks)
        ]
        assert sorted(address for share in shares for address in share) == walk(Feed(0, spans, checks))
