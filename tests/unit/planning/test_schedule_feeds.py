"""Addresses, the feeds that walk through them, and whose turn each of them is."""

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.planning.costs import Span
from distill.planning.schedule import TRAIN, Address, Checks, Feed, Turns
from tests.feeding import NEVER, walk


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
        assert [feed.units_at(address) for address in walk(feed)] == [(1,), (1,), (1, 7)]

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
        assert feed.units_at(Address(1)) == (0, 3)
        assert feed.units_at(Address(1, 0)) == (3,)

    def test_a_block_that_joins_later_does_not_look_earlier(self) -> None:
        feed = Feed(0, [Span(0, 0, 9), Span(3, 2, 9)], Checks(every=2, batches=1))
        assert feed.units_at(Address(1, 0)) == (0,)
        assert feed.units_at(Address(3, 0)) == (0, 3)

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
