"""Which batch the first rank of a relay computes next, for its own blocks and for those behind it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distill.engine.streams.relay import Next, OwnBatches
from distill.planning.costs import Span
from distill.planning.schedule import Address, Checks, Feed


class Steps:
    """A data set whose batches are their steps."""

    def train_batches(self, start: int, stop: int, *_: int, every: int) -> Any:
        return (SimpleNamespace(images=step) for step in range(start, stop, every))

    def train_batch(self, step: int, *_: int) -> Any:
        return SimpleNamespace(images=step)


def first_rank(own: int, behind: int) -> tuple[OwnBatches, Feed, Any]:
    """Its blocks at step `own`, those behind at step `behind`; also what sends to them, which says if it is slow."""
    ours, sender = Feed(0, [Span(0, own, 20)], Checks()), SimpleNamespace(ready=True)
    part: Any = SimpleNamespace(rank=1, sender=sender)
    after = Next(Feed(1, [Span(1, behind, 20)], Checks()), 1, (part,))
    dataset: Any = Steps()
    return OwnBatches(dataset, budget=20, own=ours, after=after), ours, sender


@pytest.mark.parametrize("slow", [False, True])
def test_the_lowest_step_comes_first_so_that_the_teacher_is_paid_once(slow: bool) -> None:
    batches, _, sender = first_rank(own=3, behind=8)
    sender.ready = not slow
    assert batches() == (Address(3), 3)


def test_blocks_that_lag_are_not_waited_for_and_catch_up_where_there_is_no_free_slot() -> None:
    batches, ours, sender = first_rank(own=6, behind=8)
    batches.lag()
    assert batches() == (Address(8), 8), "the ranks behind have a free slot"
    sender.ready = False
    for step in (6, 7):
        assert batches() == (Address(step), step)
        ours.advance()
    sender.ready = True
    assert batches() == (Address(8), 8), "in step again"
    ours.finish(0)
    assert batches() == (Address(8), 8), "for the ranks behind alone"
