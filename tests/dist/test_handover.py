"""A block's state from one rank to another, both here in one process."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import pytest
import torch

from distill.engine.rebalance.handover import HandOver, taken
from distill.engine.rebalance.moves import Move
from distill.errors import DistillError
from distill.observability.trace import Trace
from distill.storage.checkpoint import Checkpoint, unit_name
from tests.dist.ranks import stop_heart, two_controls


class Taker:
    """What stands for a block's trainer: it keeps the state that it is given."""

    def __init__(self, block: int) -> None:
        self.unit, self.step, self.state = block, 0, Checkpoint("", 0, {}, {}, {})

    def take_over(self, state: Checkpoint) -> None:
        self.step, self.state = state.step, state


def state(block: int, step: int) -> Checkpoint:
    return Checkpoint(unit_name(block), step, {"w": torch.full((3,), float(block))}, {}, {})


def hand_over(control: Any) -> HandOver:
    make: Any = Taker
    return HandOver(control, make=make, trace=Trace())


def test_several_states_travel_between_the_same_two_ranks_each_to_its_block() -> None:
    moves = [Move(number, block, source=0, target=1, step=7) for number, block in enumerate((5, 2))]
    with two_controls() as (here, there):
        giver, taker = hand_over(here), hand_over(there)
        for move in moves:
            taker.expect(move)
        for move in reversed(moves):
            giver.give(move, state(move.unit, 7))
        for move in moves:
            found: Any = taker.take(move)
            assert (found.unit, found.step) == (move.unit, 7)
            assert found.state.weights["w"].tolist() == [float(move.unit)] * 3
            assert taken(here, move)
        giver.close()
        taker.close()


def test_a_block_that_has_ended_where_it_was_is_not_taken_and_nobody_waits_for_it() -> None:
    move = Move(0, 5, source=0, target=1, step=7)
    with two_controls() as (here, there):
        giver, taker = hand_over(here), hand_over(there)
        taker.expect(move)
        assert not taker.arrived(move)
        assert not taken(here, move)
        giver.give(move, None)
        assert taker.take(move) is None
        assert taken(here, move)


def test_states_that_were_handed_over_are_not_kept() -> None:
    move, kept = Move(0, 5, source=0, target=1, step=7), state(5, 7)
    with two_controls() as (here, there):
        giver, taker = hand_over(here), hand_over(there)
        giver.give(move, kept)
        found: Any = taker.take(move)
        giver.close()
        states = [weakref.ref(kept), weakref.ref(found.state)]
        del kept, found
        assert [one() for one in states] == [None, None]


def test_closing_waits_until_a_state_has_gone() -> None:
    move = Move(0, 5, source=0, target=1, step=7)
    with two_controls() as (here, there):
        giver, taker = hand_over(here), hand_over(there)
        start = time.monotonic()
        threading.Timer(0.5, lambda: taker.expect(move)).start()
        giver.give(move, state(5, 7))
        giver.close()
        assert time.monotonic() - start >= 0.5
        assert taker.take(move) is not None


def test_a_giver_that_dies_is_told_to_whoever_looks_or_waits() -> None:
    move = Move(0, 5, source=0, target=1, step=7)
    with two_controls(timeout_s=1.0) as (here, there):
        stop_heart(here)
        taker = hand_over(there)
        taker.expect(move)
        told = "rank 1: no state of block 5 at step 7 from rank 0"
        with pytest.raises(DistillError, match=told):
            while not taker.arrived(move):
                time.sleep(0.01)
        with pytest.raises(DistillError, match=told):
            taker.take(move)
        with pytest.raises(DistillError, match=told):
            taker.close()


def test_a_taker_that_does_not_come_is_told_at_the_end() -> None:
    move = Move(0, 5, source=0, target=1, step=7)
    with two_controls(timeout_s=1.0) as (here, _):
        giver = hand_over(here)
        giver.give(move, state(5, 7))
        with pytest.raises(DistillError, match="rank 0: could not connect to rank 1"):
            giver.close()
