"""The one training loop: whatever the rank and the plan, take a delivery, train the units it is for, hand over those
that finish. Decides nothing about placement and touches no process group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from safetensors.torch import save as to_bytes

from distill.distributed.edges.receiver import Delivery
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


@dataclass(frozen=True, kw_only=True)
class Outlets:
    """Where what training gives goes: a finished unit's ledger entry and weights (safetensors bytes), the state of an
    unfinished one every `checkpoint_every` steps, every reading, and units that change ranks."""

    deliver: Callable[[Entry, bytes], None]
    save: Callable[[Checkpoint], None]
    checkpoint_every: int
    report: Callable[[BlockTrainer, Reading], None]
    exchange: Exchange


class Attempt(NamedTuple):
    """One rank's part in one attempt at the stage, which has `started` at that time.monotonic()."""

    rank: int
    generation: int
    started: float


def distill(
    stream: Stream,
    trainers: Sequence[BlockTrainer],
    outlets: Outlets,
    *,
    attempt: Attempt,
    checks: Checks,
    trace: Trace,
) -> None:
    """Train this rank's units until all have been handed over. Runs on every rank; none waits for another's end.

    Units come and go where the stream says. What is handed over or given away is freed.
    """
    training = Training(stream, trainers, outlets, attempt=attempt, checks=checks, trace=trace)
    for event in stream:
        match event:
            case Delivery():
                training.train(event)
            case Move(source=giver) if giver == attempt.rank:
                training.give(event)
            case Move():
                training.take(event)


class Training:
    """The units that a rank trains at a time, and what happens to them."""

    def __init__(
        self,
        stream: Stream,
        trainers: Sequence[BlockTrainer],
        outlets: Outlets,
        *,
        attempt: Attempt,
        checks: Checks,
        trace: Trace,
    ) -> None:
        self._stream, self._outlets, self._attempt = stream, outlets, attempt
        self._checks, self._trace = checks, trace
        self._owned = {trainer.unit.number: trainer for trainer in trainers}
        self._first = {trainer.unit.number: trainer.step for trainer in trainers}
        for trainer in trainers:
            if trainer.finished:  # resumed at its very end
                self._hand_in(trainer)

    def train(self, delivery: Delivery) -> None:
        """Let every unit that it is for learn from a batch, or look at it."""
        address, boundaries = delivery.address, delivery.boundaries
        # a list of its own: units that finish leave self._owned within the loop
        for trainer in _due(self._owned.values(), address, self._first):
            inputs, targets = boundaries[trainer.unit.input], boundaries[trainer.unit.target]
            reading = None
            with trainer.lane.entered(), self._trace.span("student", trainer.unit.name, address.step, on_device=True):
                if address.is_training:
                    reading = trainer.update(inputs, targets)
                else:
                    trainer.look(inputs, targets, last=address.check == self._checks.batches - 1)
            if reading is not None:
                self._outlets.report(trainer, reading)
            if not trainer.finished and self._is_time_to_save(trainer, address):
                self._save(trainer)  # reads the losses, and so may find that the unit has diverged
            if trainer.finished:
                self._hand_in(trainer)

    def give(self, move: Move) -> None:
        """Give a unit away, unless it has come to its end here before the word of that got around."""
        trainer = self._owned.pop(move.unit, None)
        state = None if trainer is None else trainer.checkpoint()
        self._outlets.exchange.give(move, state)
        if trainer is None:
            return
        if state is None:  # reading the losses has shown that it has diverged
            self._hand_in(trainer)
        else:
            trainer.free()

    def take(self, move: Move) -> None:
        """Go on with a unit of another rank, unless it has come to its end there."""
        taken = self._outlets.exchange.take(move)
        if taken is not None:
            self._owned[taken.unit.number], self._first[taken.unit.number] = taken, taken.step

    def _is_time_to_save(self, trainer: BlockTrainer, address: Address) -> bool:
        # after the looks that follow a step, not before them: a unit resumed from a checkpoint lets those looks pass
        return trainer.step % self._outlets.checkpoint_every == 0 and self._checks.after(address).is_training

    def _save(self, trainer: BlockTrainer) -> None:
        state = trainer.checkpoint()
        if state is not None:
            self._outlets.save(state)

    def _hand_in(self, trainer: BlockTrainer) -> None:
        self._stream.finish(trainer.unit.number)
        self._outlets.deliver(*_entry(trainer, self._attempt))
        self._owned.pop(trainer.unit.number, None)
        trainer.free()


def _due(trainers: Iterable[BlockTrainer], address: Address, first: Mapping[int, int]) -> list[BlockTrainer]:
    """The trainers whose next batch this is; one resumed further ahead, at step `first`, lets earlier batches pass, and
    the looks after them: its checkpoint was written after its own."""
    step = address.step if address.is_training else address.step + 1
    due = [trainer for trainer in trainers if not trainer.finished and first[trainer.unit.number] <= address.step]
    assert all(trainer.step == step for trainer in due), f"a batch was missed before {address}"
    return due


def _entry(trainer: BlockTrainer, attempt: Attempt) -> tuple[Entry, bytes]:
    finished_at_s = time.monotonic() - attempt.started
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
        rank=attempt.rank,
        steps=final.step,
        status="finished" if trainer.diverged_at is None else "diverged",
        rel_error_first=trainer.progress.rel_error_first,
        rel_error_last=trainer.progress.rel_error_last,
        rel_error_held_out=trainer.progress.rel_error_held_out,
        seconds=trainer.progress.seconds,
        finished_at_s=finished_at_s,
        generation=attempt.generation,
        diverged_at=trainer.diverged_at,
    )
    return entry, to_bytes(contiguous(final.weights))
