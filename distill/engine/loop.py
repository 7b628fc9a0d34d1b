"""The one training loop: whatever the rank and the plan, take a delivery, train the units it is for, hand over those
that finish. Decides nothing about placement and touches no process group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from safetensors.torch import save as to_bytes

from distill.engine.rebalance.moves import Move
from distill.engine.streams.broadcast import Stream
from distill.observability.trace import Trace
from distill.planning.schedule import Address, Checks
from distill.storage.checkpoint import Checkpoint, contiguous
from distill.storage.ledger import Entry
from distill.training.trainer import BlockTrainer, Reading

log = logging.getLogger(__name__)


class Exchange(Protocol):
    """How units come from other ranks and go to them."""

    def give(self, move: Move, state: Checkpoint | None) -> None:
        """Send a unit's state on its way; None: the unit has come to its end here."""

    def take(self, move: Move) -> BlockTrainer | None:
        """Return a unit's trainer at the step of the move; None: it has come to its end where it was."""


def distill(
    stream: Stream,
    trainers: Sequence[BlockTrainer],
    *,
    rank: int,
    generation: int,
    started: float,
    checks: Checks,
    save: Callable[[Checkpoint], None],
    checkpoint_every: int,
    deliver: Callable[[Entry, bytes], None],
    report: Callable[[BlockTrainer, Reading], None],
    exchange: Exchange,
    trace: Trace,
) -> None:
    """Train this rank's units until all have been handed over. Runs on every rank; none waits for another's end.

    The stage has `started` at that time.monotonic(). `deliver` takes a finished unit's ledger entry and weights
    (safetensors bytes), `save` the state of an unfinished one every `checkpoint_every` steps, `report` every reading;
    units come and go by `exchange` where the stream says. What is handed over or given away is freed.
    """
    owned = {trainer.unit.number: trainer for trainer in trainers}
    first = {trainer.unit.number: trainer.step for trainer in trainers}

    def hand_in(trainer: BlockTrainer) -> None:
        stream.finish(trainer.unit.number)
        seconds = time.monotonic() - started
        deliver(*_entry(trainer, rank=rank, generation=generation, finished_at_s=seconds))
        owned.pop(trainer.unit.number, None)
        trainer.free()

    for trainer in trainers:
        if trainer.finished:  # resumed at its very end
            hand_in(trainer)
    for delivery in stream:
        if isinstance(delivery, Move) and delivery.source == rank:
            _give(owned.pop(delivery.unit, None), delivery, exchange, hand_in)
            continue
        if isinstance(delivery, Move):
            taken = exchange.take(delivery)
            if taken is not None:
                owned[taken.unit.number], first[taken.unit.number] = taken, taken.step
            continue
        address = delivery.address
        for trainer in _due(owned.values(), address, first):
            inputs, targets = delivery.boundaries[trainer.unit.input], delivery.boundaries[trainer.unit.target]
            reading = None
            with trainer.lane.entered(), trace.span("student", trainer.unit.name, address.step, on_device=True):
                if address.is_training:
                    reading = trainer.update(inputs, targets)
                else:
                    trainer.look(inputs, targets, last=address.check == checks.batches - 1)
            if reading is not None:
                report(trainer, reading)
            if not trainer.finished and trainer.step % checkpoint_every == 0 and checks.after(address).is_training:
                _save(trainer, save)  # reads the losses, and so may find that the unit has diverged
            if trainer.finished:
                hand_in(trainer)


def _give(
    trainer: BlockTrainer | None, move: Move, exchange: Exchange, hand_in: Callable[[BlockTrainer], None]
) -> None:
    """Give a unit away, unless (None) it has come to its end here before the word of that got around."""
    state = None if trainer is None else trainer.checkpoint()
    exchange.give(move, state)
    if trainer is None:
        return
    if state is None:  # reading the losses has shown that it has diverged
        hand_in(trainer)
    else:
        trainer.free()


def _due(trainers: Iterable[BlockTrainer], address: Address, first: Mapping[int, int]) -> list[BlockTrainer]:
    """The trainers whose next batch this is; one resumed further ahead, at step `first`, lets earlier batches pass, and
    the looks after them: its checkpoint was written after its own."""
    step = address.step if address.is_training else address.step + 1
    due = [trainer for trainer in trainers if not trainer.finished and first[trainer.unit.number] <= address.step]
    assert all(trainer.step == step for trainer in due), f"a batch was missed before {address}"
    return due


def _save(trainer: BlockTrainer, save: Callable[[Checkpoint], None]) -> None:
    state = trainer.checkpoint()
    if state is not None:
        save(state)


def _entry(trainer: BlockTrainer, *, rank: int, generation: int, finished_at_s: float) -> tuple[Entry, bytes]:
    final = trainer.final()
    if trainer.diverged_at is not None:
        log.error(
            "block %s: its loss is not finite at step %d; it is stopped and its weights of step %d are kept",
            trainer.unit.name, trainer.diverged_at, final.step,
        )  # fmt: skip
    entry = Entry(
        unit=trainer.unit.number,
        block=trainer.unit.input,
        name=trainer.unit.name,
        rank=rank,
        steps=final.step,
        status="finished" if trainer.diverged_at is None else "diverged",
        rel_error_first=trainer.progress.rel_error_first,
        rel_error_last=trainer.progress.rel_error_last,
        rel_error_held_out=trainer.progress.rel_error_held_out,
        seconds=trainer.progress.seconds,
        finished_at_s=finished_at_s,
        generation=generation,
        diverged_at=trainer.diverged_at,
    )
    return entry, to_bytes(contiguous(final.weights))
