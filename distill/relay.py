"""A rank that runs a stretch of the teacher itself: on its own batches, or on what the rank before it passes on.

Where the stretch begins with the images and nothing is passed on, that is all a rank of its own needs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.blocks import Chain
from distill.data import Dataset
from distill.errors import DistillError
from distill.protocol import Address, Feed
from distill.receiver import BoundaryReceiver, Delivery
from distill.sender import BoundarySender
from distill.stream import WAKE_S, TrainingBatches
from distill.trace import Trace

Origin = Callable[[], "tuple[Address, Tensor] | None"]  # the next batch of the stretch's first boundary


@dataclass(frozen=True)
class Next:
    """The rank that a relay passes its last boundary on to, and everything that ranks from there on still need."""

    feed: Feed
    boundary: int
    sender: BoundarySender


class OwnBatches:
    """Images for the addresses that this rank, or one after it, still needs."""

    def __init__(
        self, dataset: Dataset, *, budget: int, feeds: tuple[Feed, ...], part: int = 0, num_parts: int = 1
    ) -> None:
        self._dataset, self._feeds = dataset, feeds
        self._batches = TrainingBatches(dataset, stop=budget, part=part, num_parts=num_parts)

    def __call__(self) -> tuple[Address, Tensor] | None:
        address = min((feed.cursor for feed in self._feeds if feed.cursor is not None), default=None)
        if address is None:
            return None
        if address.is_training:
            return address, self._batches.images(address.step)
        return address, self._dataset.validation_batch(address.check).images


class PassedOn:
    """One boundary for the addresses that the rank before passes on; it may still pass some that nobody needs."""

    def __init__(self, receiver: BoundaryReceiver, boundary: int, trace: Trace) -> None:
        self._receiver, self._boundary, self._trace = receiver, boundary, trace

    def __call__(self) -> tuple[Address, Tensor] | None:
        start = time.perf_counter()
        delivery = self._receiver.next()
        step = None if delivery is None else delivery.address.step
        self._trace.since(start, "wait", "for a batch", step)
        return None if delivery is None else (delivery.address, delivery.boundaries[self._boundary])


class RelayStream:
    """Deliveries for this rank's blocks from its own stretch of the teacher, which begins at boundary `first`.

    Activations are rounded to `rounded_to` for the students alone: the teacher goes on with what it computed, here and
    on the next rank, so that no result depends on where it was cut.
    """

    def __init__(
        self,
        *,
        chain: Chain,
        origin: Origin,
        first: int,
        own: Feed,
        after: Next | None,
        finished_elsewhere: Callable[[], list[int]],
        rounded_to: torch.dtype,
        wake: threading.Event,
        timeout_s: float,
        trace: Trace,
    ) -> None:
        self._chain, self._origin, self._first = chain, origin, first
        self._own, self._after = own, after
        self._finished_elsewhere = finished_elsewhere
        self._rounded_to = rounded_to
        self._wake, self._timeout_s, self._trace = wake, timeout_s, trace
        self.passes = 0

    def __iter__(self) -> Iterator[Delivery]:
        while (batch := self._origin()) is not None:
            address, x = batch
            self._hear_of_finished()
            ours = self._own.cursor == address
            theirs = self._after is not None and self._after.feed.cursor == address
            keep = set(self._own.boundaries_at(address)) if ours else set()
            if theirs:
                assert self._after is not None
                self._wait_for(self._after, address)
                keep.add(self._after.boundary)
            if not keep:
                continue
            boundaries = self._teach(x, address, keep)
            if theirs:
                assert self._after is not None
                self._after.sender.send(address, {self._after.boundary: boundaries[self._after.boundary]})
                self._after.feed.advance()
                self._close_if_done()
            if ours:
                wanted = self._own.boundaries_at(address)
                self._own.advance()
                yield Delivery(address, {k: boundaries[k].to(self._rounded_to) for k in wanted})
        self._end()

    def finish(self, block: int) -> None:
        self._own.finish(block)
        if self._after is not None:
            self._after.feed.finish(block)
            self._close_if_done()

    def _hear_of_finished(self) -> None:
        for block in self._finished_elsewhere():
            self.finish(block)

    def _close_if_done(self) -> None:
        if self._after is not None and self._after.feed.cursor is None:
            self._after.sender.close()

    def _end(self) -> None:
        """Nothing more comes: let the next rank go."""
        if self._after is not None:
            self._after.sender.close()
            with self._trace.span("wait", "for the last batches to be taken"):
                self._after.sender.join()

    def _wait_for(self, after: Next, address: Address) -> None:
        if after.sender.ready:
            return
        start, rank = time.perf_counter(), after.feed.rank
        while not after.sender.ready:
            if time.perf_counter() - start > self._timeout_s:
                raise DistillError(
                    f"rank {self._own.rank}: rank {rank} has taken no batch for {self._timeout_s:g} s; read "
                    f"logs/rank{rank}.log, or raise plan.timeout_s"
                )
            self._wake.wait(WAKE_S)
            self._wake.clear()
        self._trace.since(start, "wait", "for a free slot", address.step)

    def _teach(self, x: Tensor, address: Address, keep: set[int]) -> dict[int, Tensor]:
        self.passes += 1
        with self._trace.span("teacher", "", address.step, on_device=True):
            return self._chain.run(x, first=self._first, last=max(keep), keep=keep)
