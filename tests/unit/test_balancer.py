"""When blocks move: what a broadcast's rank 0 makes of the paces it has heard, without ranks or edges."""

from __future__ import annotations

from typing import Any

from distill.assignments import Balancer
from distill.plan import Plan, Span
from distill.protocol import Checks, Feed, Schedule
from distill.takeover import Room

EVEN = 1.0  # seconds of a step


class Said:
    """A store in which every rank has said what a step of its blocks takes."""

    def __init__(self, paces: dict[int, dict[int, float]]) -> None:
        self._paces = paces

    def get(self, key: str) -> Any:
        rank = int(key.removeprefix("pace/"))
        return {str(block): [seconds, 0] for block, seconds in self._paces.get(rank, {}).items()}


def balancer(
    *owners: tuple[int, ...], spans: tuple[Span, ...], checks: Checks | None = None, **changes: Any
) -> tuple[Balancer, Schedule]:
    """The balancer of a broadcast in which every step takes as long, unless told otherwise."""
    checks = checks or Checks()
    slowness = changes.pop("slowness", ())
    plan = Plan("broadcast", owners, spans, 1.0, (1.0,) * len(owners), slowness=slowness)
    schedule = Schedule(Feed(rank, plan.spans_of(rank), checks) for rank in range(len(owners)))
    settings: dict[str, Any] = {
        "control": Said({rank: dict.fromkeys(owned, EVEN) for rank, owned in enumerate(owners)}),
        "moves_blocks": True,
        "room": None,
        "plateau": False,
        "teacher_s": lambda: 0.0,
    }
    return Balancer(schedule=schedule, plan=plan, **settings | changes), schedule


HUNDRED = (Span(0, 0, 100), Span(1, 0, 100))


def test_a_dry_rank_is_given_one_of_two_blocks() -> None:
    assert balancer((), (0, 1), (), spans=HUNDRED)[0].moves([2]) == [(0, 1, 2)]


def test_nothing_moves_where_blocks_stay_or_somebodys_pace_is_not_known() -> None:
    assert balancer((), (0, 1), (), spans=HUNDRED, moves_blocks=False)[0].moves([2]) == []
    assert balancer((), (0, 1), (), spans=HUNDRED, control=Said({1: {0: EVEN}}))[0].moves([2]) == []


def test_the_teachers_passes_are_part_of_what_rank_0_has_left_and_of_no_other_rank() -> None:
    only = (Span(0, 0, 100),)
    assert balancer((0,), (), spans=only, teacher_s=lambda: EVEN)[0].moves([1]) == [(0, 0, 1)]
    assert balancer((), (0,), (), spans=only, teacher_s=lambda: EVEN)[0].moves([2]) == []
    assert balancer((), (0, 1), (), spans=HUNDRED, teacher_s=lambda: 3 * EVEN)[0].moves([2]) == []


def test_a_block_that_may_stop_early_is_expected_to_go_on_as_long_as_it_has_been_trained() -> None:
    spans = (Span(0, 4, 100), Span(1, 50, 100))
    paces = Said({1: {0: EVEN, 1: EVEN / 20}})  # 96 and 2.5 seconds left, or 4 and 2.5
    assert balancer((), (0, 1), (), spans=spans, control=paces)[0].moves([2]) == []
    assert balancer((), (0, 1), (), spans=spans, control=paces, plateau=True)[0].moves([2]) == [(1, 1, 2)]


def test_no_block_leaves_a_rank_in_the_middle_of_a_look() -> None:
    found, schedule = balancer((), (0, 1), (), spans=HUNDRED, checks=Checks(every=1, batches=2))
    schedule.feeds[1].advance()
    assert found.moves([2]) == []
    schedule.feeds[1].advance()
    schedule.feeds[1].advance()
    assert found.moves([2]) == [(0, 1, 2)]


def test_room_that_a_move_has_taken_stays_taken() -> None:
    room = Room((50, 50, 10), on_target=(10, 10), on_rank_0=(0, 0))
    found, _ = balancer((), (0, 1), (), spans=HUNDRED, room=room)
    assert found.could_take(2)
    assert found.moves([2]) == [(0, 1, 2)]
    assert not found.could_take(2)
    assert found.moves([2]) == []


def test_a_rank_can_take_what_is_one_of_several_or_beside_the_teacher_or_on_a_slower_rank() -> None:
    one = (Span(0, 0, 100),)
    assert balancer((), (0, 1), (), spans=HUNDRED)[0].could_take(2)
    assert balancer((0,), (), spans=one)[0].could_take(1)
    assert not balancer((), (0,), (), spans=one)[0].could_take(2)
    assert not balancer((), (0,), (), spans=one)[0].could_take(1), "its own"
    assert balancer((), (0,), (), spans=one, slowness=(1.0, 2.0, 1.0))[0].could_take(2)
    assert not balancer((), (0,), (), spans=one, slowness=(1.0, 1.0, 2.0))[0].could_take(2)
    assert not balancer((), (0, 1), (), spans=HUNDRED, moves_blocks=False)[0].could_take(2)
