"""Programs timed in turn on made-up clocks, and the script that runs without the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from distill.deployment import measure
from distill.deployment.measure import MIN_ROUNDS, TURN_S, Call, beside, in_turn, summary


class Machine:
    """A clock, and programs that move it on: the time goes by of what else runs there."""

    def __init__(self, *, slow: Callable[[int], float] = lambda turn: 1.0) -> None:
        self.now, self.turns, self._slow = 0.0, list[str](), slow

    def program(self, name: str, seconds: float) -> Call:
        def call(times: int) -> float:
            took = times * seconds * self._slow(len(self.turns))
            self.turns.append(name)
            self.now += took
            return took

        return call

    def time(self, programs: Sequence[Call], **options: float) -> list[list[float]]:
        return in_turn(programs, clock=lambda: self.now, **options)  # type: ignore[arg-type]


class TestSummary:
    def test_it_has_the_median_and_the_quartiles_in_milliseconds(self) -> None:
        one = summary([0.004, 0.001, 0.002, 0.003, 0.1])
        assert (one.low_ms, one.median_ms, one.high_ms, one.rounds) == pytest.approx((2, 3, 4, 5))
        assert one.error_ms == pytest.approx(0.93 * 2 / math.sqrt(5))
        assert one.error == pytest.approx(one.error_ms / 3)

    def test_a_single_round_is_known_to_nothing(self) -> None:
        assert summary([0.002]).error == 1.0

    def test_what_takes_no_time_has_no_relative_error(self) -> None:
        assert summary([0.0, 0.0]).error == math.inf

    def test_beside_another_program_what_slows_both_down_cancels(self) -> None:
        base = [0.01, 0.05, 0.02, 0.04]
        alone, difference = beside([1.3 * seconds for seconds in base], base, 20.0)
        assert (alone.median_ms, difference.median_ms) == pytest.approx((26, 6))
        assert (alone.error_ms, difference.error_ms) == pytest.approx((0, 0), abs=1e-9)


class TestInTurn:
    def test_steady_programs_take_the_fewest_rounds(self) -> None:
        machine = Machine()
        rounds = machine.time([machine.program("a", 0.01), machine.program("b", 0.02)])
        assert [len(seconds) for seconds in rounds] == [MIN_ROUNDS] * 2
        assert [summary(seconds).median_ms for seconds in rounds] == pytest.approx([10, 20])

    def test_every_round_has_a_turn_of_each_and_orders_change(self) -> None:
        machine = Machine()
        machine.time([machine.program(name, TURN_S) for name in "abc"])
        turns = "".join(machine.turns[6:])  # behind two calls of each to warm up
        parts = [turns[at : at + 3] for at in range(0, len(turns), 3)]
        assert all(sorted(part) == ["a", "b", "c"] for part in parts)
        assert len(set(parts)) > 2

    def test_short_calls_are_made_several_times_in_a_turn_behind_one_that_does_not_count(self) -> None:
        asked = []

        def program(times: int) -> float:
            asked.append(times)
            return times * TURN_S / 10

        assert summary(in_turn([program])[0]).median_ms == pytest.approx(100 * TURN_S)
        assert asked == [1, 1, *[1, 10] * MIN_ROUNDS]

    def test_rounds_go_on_until_the_medians_are_known(self) -> None:
        machine = Machine(slow=lambda turn: 1.0 + 0.1 * (turn % 7) / 7)
        (seconds,) = machine.time([machine.program("a", 0.01)], error=0.004, limit_s=100.0)
        assert len(seconds) > MIN_ROUNDS
        assert summary(seconds).error <= 0.004 < summary(seconds[:-1]).error

    def test_they_end_when_time_is_up_and_the_error_tells(self) -> None:
        machine = Machine(slow=lambda turn: 1.0 + turn % 2)
        (seconds,) = machine.time([machine.program("a", 0.01)], error=0.001, limit_s=0.5)
        assert 0.5 <= sum(seconds) < 0.6
        assert summary(seconds).error > 0.001

    def test_a_call_that_takes_longer_than_the_limit_is_timed_once(self) -> None:
        machine = Machine()
        assert machine.time([machine.program("a", 9.0)], limit_s=3.0) == [[9.0]]

    def test_a_machine_that_slows_down_and_up_again_changes_no_difference(self) -> None:
        machine = Machine(slow=lambda turn: 1.0 if turn % 12 < 6 else 3.0)
        a, b = machine.time([machine.program("a", 0.010), machine.program("b", 0.012)], error=1e-9, limit_s=20.0)
        assert summary(a).error > 0.01
        assert beside(b, a, 10.0)[1].median_ms == pytest.approx(2.0)


def test_one_thread_is_timed_by_the_processor_and_several_by_the_wall() -> None:
    assert [measure.clock_of(threads)[0] for threads in (1, 2)] == ["processor", "wall"]
