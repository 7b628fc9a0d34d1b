"""A broadcast with several teacher ranks: each computes the batches of its turns for everybody, and every rank puts
what they send into the order of addresses.

No cycle of waiting can arise: see docs/architecture.md.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from distill.distributed.edges.receiver import BoundaryReceiver, Delivery
from distill.engine.streams.broadcast import TeacherStream
from distill.errors import DistillError
from distill.observability.trace import Trace
from distill.planning.schedule import Feed, Service, Turns


class Source(Protocol):
    """Deliveries of one teacher rank, in the order of addresses."""

    @property
    def arrived(self) -> bool:
        """Whether next() would return at once."""

    def next(self) -> Delivery | None:
        """Return the next delivery; None when nothing more comes."""


class OwnTurns:
    """What this rank's own teacher has computed ahead for its own students."""

    def __init__(self) -> None:
        self._deliveries: deque[Delivery] = deque()

    def __len__(self) -> int:
        return len(self._deliveries)

    @property
    def arrived(self) -> bool:
        return bool(self._deliveries)

    def next(self) -> Delivery | None:
        return self._deliveries.popleft()

    def put(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)


class Merger:
    """The deliveries for this rank's units from all teacher ranks, in the order of their addresses."""

    def __init__(
        self, own: Feed, turns: Turns, receivers: Mapping[int, BoundaryReceiver], own_turns: OwnTurns | None = None
    ) -> None:
        self._own, self._turns = own, turns
        self._open = dict(receivers)
        self._sources: dict[int, Source] = {**receivers}
        if own_turns is not None:
            self._sources[own.rank] = own_turns

    @property
    def awaited(self) -> int | None:
        """The teacher rank of the next delivery; None when this rank needs nothing more."""
        return None if self._own.cursor is None else self._turns.teacher_of(self._own.cursor)

    @property
    def step(self) -> int | None:
        """The step of the next delivery."""
        return None if self._own.cursor is None else self._own.cursor.step

    def next(self) -> Delivery | None:
        """Wait for the next delivery; None when this rank needs nothing more."""
        while self.awaited is not None:
            if (delivery := self._taken(self._sources[self.awaited])) is not None:
                return delivery
        return None

    def arrived(self) -> Delivery | None:
        """Return the next delivery if it is there."""
        while self.awaited is not None and self._sources[self.awaited].arrived:
            if (delivery := self._taken(self._sources[self.awaited])) is not None:
                return delivery
        return None

    def discard(self) -> None:
        """Drop what has arrived though this rank needs nothing more, so that its senders are not held up."""
        for teacher, receiver in list(self._open.items()):
            while receiver.arrived and teacher in self._open:
                if receiver.next() is None:
                    del self._open[teacher]

    def end(self) -> None:
        """Take what still comes until every teacher rank has closed its edge."""
        for receiver in self._open.values():
            receiver.take_the_rest()

    def finish(self, unit: int) -> None:
        self._own.finish(unit)

    def _taken(self, source: Source) -> Delivery | None:
        """Take a delivery from the source; None where it was sent before its units were known to be finished."""
        delivery = source.next()
        if delivery is None:
            raise DistillError(
                f"rank {self._own.rank}: rank {self.awaited} has ended its turns before step {self.step}; read "
                f"logs/rank{self.awaited}.log"
            )
        if delivery.address != self._own.cursor:
            return None
        self._own.advance()
        return delivery


class MergedStream:
    """A rank that is no teacher rank: deliveries as they arrive from several."""

    def __init__(self, merger: Merger, trace: Trace) -> None:
        self._merger, self._trace = merger, trace

    def __iter__(self) -> Iterator[Delivery]:
        while True:
            start, step = time.perf_counter(), self._merger.step
            delivery = self._merger.next()
            self._trace.since(start, "wait", "for a batch", step)
            if delivery is None:
                break
            yield delivery
        with self._trace.span("wait", "for the teacher ranks to end"):
            self._merger.end()

    def finish(self, unit: int) -> None:
        self._merger.finish(unit)


class TeacherInTurn(TeacherStream):
    """One of several teacher ranks. It trains on what has arrived, and else computes the batches of its turns ahead for
    everybody who has a free slot, itself included; only where neither is possible does it wait, and then for both."""

    def __init__(self, *, merger: Merger, own_turns: OwnTurns, window: int, **usual: Any) -> None:
        super().__init__(**usual)
        self._merger, self._own_turns, self._window = merger, own_turns, window

    def __iter__(self) -> Iterator[Delivery]:
        idle_since, waiting = time.perf_counter(), False
        while True:
            self._hear_of_finished()
            # What has arrived comes first: taking it frees a slot that another teacher rank may be waiting for, while
            # computing ahead only fills some.
            delivery = self._merger.arrived()
            service = self._schedule.choose(self._ready(), time.monotonic()) if delivery is None else None
            step = self._merger.step if service is None else service.address.step
            if waiting and (delivery is not None or service is not None):
                self._trace.since(idle_since, "wait", "for a batch or a free slot", step)
            if delivery is not None:
                yield delivery
            elif service is not None:
                self._compute_ahead(service)
            elif self._schedule.finished and self._merger.awaited is None:
                break
            else:
                waiting = True
                self._wait(time.perf_counter() - idle_since)
                continue
            idle_since, waiting = time.perf_counter(), False
        # The edges from here were closed by _hear_of_finished() above, before the loop could end: two teacher ranks
        # that wait for one another's end both find it.
        with self._trace.span("wait", "for the other teacher ranks to end"):
            self._merger.end()
        self._end()

    def finish(self, unit: int) -> None:
        super().finish(unit)
        self._merger.finish(unit)

    def _compute_ahead(self, service: Service) -> None:
        own = self._serve(service)
        if own is not None:
            self._own_turns.put(own)

    def _ready(self) -> set[int]:
        # this rank has no edge to itself whose window would hold it back from computing ahead without end
        ready = super()._ready()
        return ready if len(self._own_turns) < self._window else ready - {self._rank}

    def _wait(self, waited_s: float) -> None:
        awaited = self._merger.awaited
        if awaited is None:
            self._merger.discard()
        elif awaited != self._rank and waited_s > self._timeout_s:
            raise DistillError(
                f"rank {self._rank}: no batch of step {self._merger.step} from rank {awaited} for {self._timeout_s:g} "
                f"s; read logs/rank{awaited}.log, or raise plan.timeout_s"
            )
        super()._wait(waited_s)
