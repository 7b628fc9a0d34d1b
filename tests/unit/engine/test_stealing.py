"""Requests and answers of work stealing, without training: two ranks' sides in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from distill.distributed.store import Control, PeerLostError
from distill.engine.rebalance import stealing
from distill.engine.rebalance.moves import Headroom, Move
from distill.engine.rebalance.pace import Pace
from distill.engine.rebalance.stealing import Giver, Taker, say_headroom
from distill.planning.costs import Span
from distill.planning.memory_model import Memory
from distill.planning.plan import Plan
from tests.dist.ranks import stop_heart, two_controls

LIMIT_S = 15.0
SPANS = tuple(Span(block, 20, 120) for block in range(3))  # a hundred steps left of each
PLAN = Plan("replicate", (tuple(range(3)), ()), SPANS, 1.0, (1.0, 1.0))
ENOUGH = Memory(resident=0, student=(5,) * 3, step=(0,) * 3, boundary=(0,) * 4, window=2, limit=20)


class Arrived:
    """A hand-over whose states are there as soon as they are expected."""

    def __init__(self) -> None:
        self.expected: list[Move] = []

    def expect(self, move: Move) -> None:
        self.expected.append(move)

    def arrived(self, move: Move) -> bool:
        return move in self.expected


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_S", "SAY_S", "AGAIN_S"):
        monkeypatch.setattr(stealing, name, 0.01)


@contextmanager
def both(
    plan: Plan = PLAN, *, pass_s: float = 0.01, step_s: float = 0.1, memory: Memory | None = None
) -> Iterator[Any]:
    """Rank 0 that gives and rank 1 that takes; yields both, and rank 0's control plane."""
    with two_controls(timeout_s=5.0) as (here, there):
        here.set("pace/0", {block: Pace(step_s, 0) for block in range(3)})
        say_headroom(here, memory and Headroom.beside(memory, (15, 0)))
        giver = Giver(here, plan, pass_s=lambda: pass_s, plateau=False)
        taker = Taker(there, plan, Arrived())  # type: ignore[arg-type]
        yield giver, taker, here
        giver.close()


def until(reached: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := reached()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def after_steps(giver: Giver, taker: Taker, spans: tuple[Span, ...] = SPANS) -> tuple[list[Move], list[Move]]:
    """Let the giver go on until it has given something, and the taker look; return what left and what arrived."""
    taker.seek()
    given = until(lambda: giver.moves(spans))
    return given, until(taker.arrived)


def test_the_giver_says_from_which_step_on_and_keeps_what_it_needs_itself() -> None:
    with both() as (giver, taker, control):
        given, arrived = after_steps(giver, taker)
        assert given == arrived == [Move(0, given[0].unit, 0, 1, 20)]
        assert taker.span_of(given[0]) == Span(given[0].unit, 20, 120)
        assert stealing.left_of(control, 0).units == 3


def refused(giver: Giver, taker: Taker, spans: tuple[Span, ...] = SPANS) -> bool:
    """Whether a request is answered, and with nothing."""
    taker.seek()
    control: Control = giver._control
    until(lambda: giver.moves(spans) or control.get("answer/0/0") is not None)
    return control.get("answer/0/0") == [] and taker.arrived() == []


def test_nothing_is_given_to_a_rank_that_is_too_slow_to_save_time() -> None:
    with both(replace(PLAN, slowness=(1.0, 4.0))) as (giver, taker, _):
        assert refused(giver, taker)


def test_nothing_is_given_for_the_last_steps() -> None:
    spans = tuple(replace(span, first=119) for span in SPANS)
    with both(step_s=0.01) as (giver, taker, _):
        assert refused(giver, taker, spans)


def test_memory_is_kept_to_and_what_was_taken_before_counts() -> None:
    enough = replace(ENOUGH, limit=20)  # rank 1 has headroom for four blocks
    with both(memory=enough) as (giver, taker, _):
        assert after_steps(giver, taker)[1]
    with both(memory=replace(ENOUGH, student=(25,) * 3)) as (giver, taker, _):
        assert refused(giver, taker)
    with both(memory=enough) as (giver, taker, _):
        taker._taken = [0, 0, 0, 0]
        assert refused(giver, taker)


def test_blocks_of_a_group_stay_with_it() -> None:
    grouped = replace(PLAN, owners=((0, 1, 2), (), ()), groups=((0, 1),))
    with two_controls() as (_, there):
        taker = Taker(there, grouped, Arrived())  # type: ignore[arg-type]
        assert taker.wait(lambda: False) == [], "nobody has any to give: it does not wait"


def test_a_relay_counts_every_stretch_of_the_teacher_that_the_taker_would_have_to_run() -> None:
    plan = replace(PLAN, strategy="relay", owners=((0, 1, 2), ()), starts=(0, 3))
    with both(plan) as (giver, _, control):
        giver.moves(SPANS)
        request = stealing.Request(1, (), 0)
        assert giver._pass_of(request) == pytest.approx(0.01)
        assert giver._pass_of(replace(request, first_stretch=1)) == 0.0
        slow = Giver(control, replace(plan, slowness=(1.0, 2.0)), pass_s=lambda: 0.01, plateau=False)
        assert slow._pass_of(request) == pytest.approx(0.02)
        slow.close()


def test_a_closed_giver_is_not_waited_for() -> None:
    with both() as (giver, taker, _):
        giver.moves(SPANS)
        taker.seek()
        until(lambda: giver._control.count("requests/0"))
        giver.close()
        assert taker.wait(lambda: False) == []


def test_the_end_of_the_stage_ends_the_wait() -> None:
    asked = []
    with both() as (_, taker, _):
        assert taker.wait(lambda: len(asked) > 3 or bool(asked.append(1))) == []


def test_a_giver_that_falls_silent_is_named() -> None:
    with both() as (giver, taker, control):
        giver.moves(SPANS)
        taker.seek()
        until(lambda: control.count("requests/0"))
        stop_heart(control)
        with pytest.raises(
            PeerLostError, match=r"rank 1: no answer to the request for blocks from rank 0.*logs/rank0.log"
        ):
            taker.wait(lambda: False)


def test_only_some_of_many_ranks_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, owners=tuple((2 * rank, 2 * rank + 1) for rank in range(40)),
                   spans=tuple(Span(block, 0, 100) for block in range(80)))  # fmt: skip
    looked = set[int]()
    monkeypatch.setattr(stealing, "left_of", lambda _, rank: looked.add(rank))
    with two_controls() as (here, _):
        taker = Taker(here, plan, Arrived())  # type: ignore[arg-type]
        assert taker._ask(here) == []
    assert len(looked) == stealing.PROBED
