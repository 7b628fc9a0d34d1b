"""Which teacher pass comes next and for whom: slots, patience, and blocks that change ranks."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.planning.costs import Span
from distill.planning.schedule import Address, Checks, Feed, Schedule, Service
from tests.feeding import NEVER, walk


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

    def test_the_teachers_own_rank_is_never_left_behind(self) -> None:
        schedule = Schedule([Feed(rank, [Span(rank, 0, 9)], NEVER) for rank in range(2)], home=0)
        now = serve_all(schedule, {0, 1}, steps=3)
        assert schedule.choose({1}, now) is None
        assert schedule.choose({1}, now + 1e6) is None
        assert schedule.choose({0, 1}, now + 1e6) == Service(Address(3), (0, 1))


class TestMoves:
    def test_a_block_is_served_to_its_new_rank_from_where_it_was(self) -> None:
        schedule = Schedule([Feed(0, [Span(0, 0, 9), Span(1, 0, 9)], NEVER), Feed(1, [Span(2, 0, 2)], NEVER)])
        serve_all(schedule, {0, 1}, steps=2)
        assert schedule.feeds[1].cursor is None
        assert schedule.move(1, 0, 1) == 2
        assert schedule.feeds[0].remaining == (Span(0, 2, 9),)
        assert schedule.feeds[1].remaining == (Span(1, 2, 9),)
        assert schedule.choose({0, 1}, 2.0) == Service(Address(2), (0, 1))

    def test_blocks_that_were_served_to_their_end_are_not_served_again(self) -> None:
        feed = Feed(0, [Span(0, 0, 5)], NEVER)
        walk(feed)
        feed.take(Span(1, 2, 5))
        assert [feed.units_at(address) for address in walk(feed)] == [(1,)] * 3

    def test_nobody_waits_for_a_rank_whose_block_is_on_its_way(self) -> None:
        schedule = Schedule([Feed(0, [Span(0, 0, 9), Span(1, 0, 9)], NEVER), Feed(1, [Span(2, 0, 2)], NEVER)])
        serve_all(schedule, {0, 1}, steps=2)
        schedule.move(1, 0, 1)
        for step in range(2, 6):
            assert schedule.choose({0}, 2.0) == Service(Address(step), (0,))
            schedule.served(Service(Address(step), (0,)), float(step))
        schedule.taken(1)
        assert schedule.choose({0, 1}, 6.0) == Service(Address(2), (1,))

    def test_a_rank_that_has_its_block_and_has_caught_up_is_waited_for_again(self) -> None:
        schedule = Schedule([Feed(0, [Span(0, 0, 9), Span(1, 0, 9)], NEVER), Feed(1, [Span(2, 0, 2)], NEVER)])
        serve_all(schedule, {0, 1}, steps=2)
        schedule.move(1, 0, 1)
        schedule.taken(1)
        assert schedule.choose({0}, 2.0) == Service(Address(2), (0,))
        serve_all(schedule, {0, 1}, steps=1, now=2.0)
        assert schedule.choose({0}, 3.0) is None

    def test_rank_0_catches_up_while_nobody_else_has_a_free_slot(self) -> None:
        schedule = Schedule([Feed(0, [Span(2, 0, 2)], NEVER), Feed(1, [Span(0, 0, 9), Span(1, 0, 9)], NEVER)], home=0)
        now = serve_all(schedule, {0, 1}, steps=2)
        schedule.move(1, 1, 0)
        for step in (2, 3):
            assert schedule.choose({1}, now) == Service(Address(step), (1,))
            schedule.served(Service(Address(step), (1,)), now)
        schedule.taken(0)
        assert schedule.choose({0, 1}, now) == Service(Address(4), (1,))
        for step in (2, 3):
            assert schedule.choose({0}, now) == Service(Address(step), (0,))
            schedule.served(Service(Address(step), (0,)), now)
        assert schedule.choose({0, 1}, now) == Service(Address(4), (0, 1))

    def test_a_look_that_has_begun_belongs_to_one_rank(self) -> None:
        feeds = [Feed(0, [Span(0, 0, 9), Span(1, 0, 9)], Checks(every=1, batches=2)), Feed(1, [], NEVER)]
        schedule = Schedule(feeds)
        serve_all(schedule, {0}, steps=2)
        with pytest.raises(AssertionError, match="a look that has begun"):
            schedule.move(1, 0, 1)

    @given(
        spans=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5),
        checks=st.builds(Checks, st.integers(0, 4), st.integers(0, 2)),
        chance=st.randoms(use_true_random=False),
    )
    def test_whatever_moves_every_block_sees_its_own_addresses_once_and_in_order(
        self, spans: list[tuple[int, int]], checks: Checks, chance: Random
    ) -> None:
        whole = [Span(block, first, first + steps) for block, (first, steps) in enumerate(spans)]
        owners = {span.unit: chance.randrange(3) for span in whole}
        feeds = {rank: Feed(rank, [s for s in whole if owners[s.unit] == rank], checks) for rank in range(3)}
        schedule = Schedule(feeds.values())
        seen: dict[int, list[Address]] = {span.unit: [] for span in whole}
        now = 0.0
        while not schedule.finished:
            dry = [rank for rank, feed in feeds.items() if feed.cursor is None]
            giver = feeds[chance.randrange(3)]
            if dry and giver.cursor is not None and giver.cursor.is_training and giver.remaining:
                schedule.move(chance.choice(giver.remaining).unit, giver.rank, dry[0])
            schedule.taken(chance.randrange(3))
            service = schedule.choose({rank for rank in range(3) if chance.random() < 0.7}, now)
            now += 1.0
            if service is None:
                continue
            for rank in service.ranks:
                for block in feeds[rank].units_at(service.address):
                    seen[block].append(service.address)
            schedule.served(service, now)
        for span in whole:
            assert seen[span.unit] == walk(Feed(0, [span], checks))
