"""Where a rank's batches come from: rank 0 runs the teacher and serves everybody, the others receive.

Both are iterators over deliveries (an address and the boundaries of this rank's units), so that one training loop
serves every rank.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

import torch
from torch import Tensor

from distill.blocks.chain import Chain
from distill.data import Dataset
from distill.distributed.edges.receiver import BoundaryReceiver, Delivery
from distill.distributed.store import Control
from distill.engine.rebalance.assignments import Assignments, announced
from distill.engine.rebalance.moves import Move
from distill.errors import DistillError
from distill.observability.trace import Trace
from distill.planning.schedule import Schedule, Service

WAKE_S = 0.005  # how often patience is looked at while nobody frees a slot


class Stream(Protocol):
    """Deliveries for this rank's units, in the order of their addresses, and moves of units in their places
    between them."""

    def __iter__(self) -> Iterator[Delivery | Move]: ...

    def finish(self, unit: int) -> None:
        """Say that `unit` needs nothing more."""


class TrainingBatches:
    """Teacher inputs by step; going forward they come from a prefetching iterator, going back by random access."""

    def __init__(self, dataset: Dataset, *, stop: int, part: int = 0, num_parts: int = 1, every: int = 1) -> None:
        """Of every batch the rows part::num_parts, up to step `stop`, usually asked for `every` so many steps."""
        self._dataset = dataset
        self._part, self._num_parts, self._every = part, num_parts, every
        self._stop = stop
        self._next = -1
        self._iterator: Iterator[Tensor] = iter(())

    def images(self, step: int) -> Tensor:
        # begun anew rather than run forward: what lies between would be decoded for nobody
        if step > self._next:
            self._next = step
            batches = self._dataset.train_batches(step, self._stop, self._part, self._num_parts, every=self._every)
            self._iterator = (batch.images for batch in batches)
        # a pass for one that was left behind: the iterator stays where the others are
        if step < self._next:
            return self._dataset.train_batch(step, self._part, self._num_parts).images
        self._next += self._every
        return next(self._iterator)


class TeacherStream:
    """A teacher rank: compute each batch once for everybody who is ready for it, send, and yield this rank's part."""

    def __init__(
        self,
        *,
        rank: int,
        chain: Chain,
        dataset: Dataset,
        schedule: Schedule,
        assignments: Assignments,
        wire_dtype: torch.dtype,
        finished_elsewhere: Callable[[], Collection[int]],
        wake: threading.Event,
        budget: int,
        every: int,
        timeout_s: float,
        trace: Trace,
    ) -> None:
        self._rank = rank
        self._chain, self._dataset, self._schedule, self._assignments = chain, dataset, schedule, assignments
        self._batches = TrainingBatches(dataset, stop=budget, every=every)
        self._wire_dtype = wire_dtype
        self._finished_elsewhere = finished_elsewhere
        self._wake = wake
        self._timeout_s = timeout_s
        self._trace = trace
        self._waiting: deque[Delivery] = deque()  # this rank's own
        self.passes = 0

    def __iter__(self) -> Iterator[Delivery | Move]:
        idle_since, waiting = time.perf_counter(), False
        while True:
            self._hear_of_finished()
            yield from self._assignments.changes()
            yield from self._own()
            # a unit on its way here still has batches in self._waiting, though nobody is fed any more
            if self._schedule.finished and not self._assignments.awaiting:
                break
            now = time.monotonic()
            service = self._schedule.choose(self._ready(), now)
            if service is None:
                waiting = True
                self._wait(time.perf_counter() - idle_since)
                continue
            if waiting:
                self._trace.since(idle_since, "wait", "for a free slot", service.address.step)
            own = self._serve(service)
            if own is not None:
                # through the queue even where it can be had at once: what waits there already is older
                self._waiting.append(own)
                yield from self._own()
            idle_since, waiting = time.perf_counter(), False
        self._end()

    def finish(self, unit: int) -> None:
        self._schedule.finish(unit)

    def _own(self) -> Iterator[Delivery]:
        """This rank's batches, unless the unit that they are for is still on its way here."""
        while self._waiting and not self._assignments.awaiting:
            yield self._waiting.popleft()

    def _serve(self, service: Service) -> Delivery | None:
        """Carry out a teacher pass; return this rank's own part of it."""
        feeds = [self._schedule.feeds[rank] for rank in service.ranks]
        wanted = {feed.rank: feed.boundaries_at(service.address) for feed in feeds}
        boundaries = self._teach(service.address.step, service.address.check, frozenset().union(*wanted.values()))
        for rank, keys in wanted.items():
            if rank != self._rank:
                self._assignments.send(rank, service.address, {k: boundaries[k] for k in keys})
        self._schedule.served(service, time.monotonic())
        if self._rank not in wanted:
            return None
        return Delivery(service.address, {k: boundaries[k] for k in wanted[self._rank]})

    def _end(self) -> None:
        with self._trace.span("wait", "for the last batches to be taken"):
            self._assignments.finish()

    def _hear_of_finished(self) -> None:
        """Take note of units that have finished elsewhere, and let the ranks go that need nothing more."""
        for unit in self._finished_elsewhere():
            self._schedule.finish(unit)
        self._assignments.close_served()

    def _ready(self) -> set[int]:
        return self._assignments.ready(len(self._waiting))

    def _wait(self, waited_s: float) -> None:
        if waited_s > self._timeout_s:
            what, rank = self._assignments.waited_for()
            raise DistillError(
                f"rank {self._rank}: {what} for {self._timeout_s:g} s; read logs/rank{rank}.log, "
                "or raise plan.timeout_s"
            )
        self._wake.wait(WAKE_S)
        self._wake.clear()

    def _teach(self, step: int, check: int, keep: frozenset[int]) -> dict[int, Tensor]:
        """Run the teacher on one batch as deep as needed; the activations are rounded to the wire's dtype for every
        student, near or far, so that no result depends on the placement."""
        self.passes += 1
        with self._trace.span("teacher", "", step, on_device=True):
            images = self._batches.images(step) if check < 0 else self._dataset.validation_batch(check).images
            boundaries = self._chain.run(images, last=max(keep), keep=keep)
            if self._wire_dtype == torch.float32:
                return boundaries
            return {k: tensor.to(self._wire_dtype) for k, tensor in boundaries.items()}


class RemoteStream:
    """Any other rank: deliveries as they arrive, over one edge after another."""

    def __init__(
        self,
        control: Control,
        *,
        units: Collection[int],
        open_edge: Callable[[int, Collection[int]], BoundaryReceiver],
        trace: Trace,
    ) -> None:
        """`open_edge` returns the receiver of this rank's `number`-th assignment, to train these units."""
        self._control, self._units, self._open_edge, self._trace = control, units, open_edge, trace

    def __iter__(self) -> Iterator[Delivery | Move]:
        receiver: BoundaryReceiver | None = self._open_edge(0, self._units)
        for number in itertools.count(1):
            if receiver is not None:
                yield from self._deliveries(receiver)
            start = time.perf_counter()
            assignment = announced(self._control, number)
            self._trace.since(start, "wait", "for word on what to do next")
            if not assignment.units and not assignment.moves:
                return
            # before the moves: taking a unit waits for its state, and its first batches arrive meanwhile
            receiver = self._open_edge(number, assignment.units) if assignment.units else None
            yield from assignment.moves

    def _deliveries(self, receiver: BoundaryReceiver) -> Iterator[Delivery]:
        while True:
            start = time.perf_counter()
            delivery = receiver.next()
            self._trace.since(start, "wait", "for a batch", None if delivery is None else delivery.address.step)
            if delivery is None:
                return
            yield delivery

    def finish(self, unit: int) -> None:
        """Nothing to do: rank 0 hears of it by the announcement of the finished unit."""
