"""A rank that runs a stretch of the teacher itself: on its own batches, or on what the rank before it passes on.

Where the stretch begins with the images and nothing is passed on, that is all a rank of its own needs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.blocks.chain import Chain
from distill.data import Dataset
from distill.distributed.edges.receiver import BoundaryReceiver, Delivery
from distill.distributed.edges.sender import BoundarySender
from distill.engine.rebalance.moves import Move
from distill.engine.rebalance.stealing import Giver, Taker
from distill.engine.streams.broadcast import WAKE_S, TrainingBatches
from distill.errors import DistillError
from distill.observability.trace import Trace
from distill.planning.schedule import Address, Feed

Origin = Callable[[], "tuple[Address, Tensor] | None"]  # the next batch of the stretch's first boundary


@dataclass(frozen=True)
class Part:
    """A rank of the next group, and the rows of this rank's batches that it gets."""

    rank: int
    rows: slice
    sender: BoundarySender


@dataclass(frozen=True)
class Next:
    """The ranks that a relay passes its last boundary on to, and everything that ranks from there on still need."""

    feed: Feed
    boundary: int
    parts: tuple[Part, ...]

    @property
    def slow(self) -> list[int]:
        """The ranks that cannot take another batch now."""
        return [part.rank for part in self.parts if not part.sender.ready]

    def send(self, address: Address, boundary: Tensor) -> None:
        for part in self.parts:
            part.sender.send(address, {self.boundary: boundary[part.rows]})

    def close(self) -> None:
        for part in self.parts:
            part.sender.close()

    def join(self) -> None:
        for part in self.parts:
            part.sender.join()


class OwnBatches:
    """Images for the addresses that this rank, or one after it, still needs: the lowest first, so that the teacher is
    paid once for both, but for units that have been taken over and lag behind: these catch up while the others, who
    must not wait for them, have no free slot."""

    def __init__(
        self, dataset: Dataset, *, budget: int, own: Feed, after: Next | None = None, part: int = 0, num_parts: int = 1
    ) -> None:
        self._dataset, self._own, self._after = dataset, own, after
        self._batches = TrainingBatches(dataset, stop=budget, part=part, num_parts=num_parts)
        self._lagging = False

    def lag(self) -> None:
        """Let this rank's units catch up with the others; they are not waited for."""
        self._lagging = True

    def __call__(self) -> tuple[Address, Tensor] | None:
        address = self._address()
        if address is None:
            return None
        if address.is_training:
            return address, self._batches.images(address.step)
        return address, self._dataset.validation_batch(address.check).images

    def _address(self) -> Address | None:
        ours = self._own.cursor
        theirs = None if self._after is None else self._after.feed.cursor
        if ours is None or theirs is None:
            return theirs or ours
        self._lagging = self._lagging and ours < theirs
        if self._lagging and self._after is not None and not self._after.slow:
            return theirs
        return min(ours, theirs)


class PassedOn:
    """One boundary for the addresses that the ranks before pass on, each its rows; they may still pass some that nobody
    needs, and not all of them the same ones."""

    def __init__(self, receivers: Sequence[BoundaryReceiver], boundary: int, trace: Trace) -> None:
        """The receivers are in the order of their rows."""
        self._receivers, self._boundary, self._trace = receivers, boundary, trace

    def __call__(self) -> tuple[Address, Tensor] | None:
        start = time.perf_counter()
        parts = self._next_of_all()
        self._trace.since(start, "wait", "for a batch", parts[0].address.step if parts else None)
        if not parts:
            return None
        rows = [part.boundaries[self._boundary] for part in parts]
        return parts[0].address, rows[0] if len(rows) == 1 else torch.cat(rows)

    def _next_of_all(self) -> list[Delivery]:
        """Return every rank's part of the next batch that all of them pass on, nothing at the end: what one of them
        leaves out is no longer needed."""
        found = [receiver.next() for receiver in self._receivers]
        while all(found) and len({part.address for part in found if part}) > 1:
            last = max(part.address for part in found if part)
            found = [
                part if part and part.address == last else receiver.next()
                for part, receiver in zip(found, self._receivers, strict=True)
            ]
        if all(found):
            return [part for part in found if part]
        for part, receiver in zip(found, self._receivers, strict=True):
            if part is not None:
                # what is left there would keep its sender waiting for a free slot until its deadline
                receiver.take_the_rest()
        return []


class RelayStream:
    """Deliveries for this rank's units from its own stretch of the teacher, which begins at boundary `first`.

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
        giver: Giver | None = None,
        taker: Taker | None = None,
        finished_elsewhere: Callable[[], list[int]],
        rounded_to: torch.dtype,
        wake: threading.Event,
        timeout_s: float,
        trace: Trace,
    ) -> None:
        """Units leave by `giver`, and come by `taker` where the stretch begins with this rank's own batches."""
        self._chain, self._origin, self._first = chain, origin, first
        self._own, self._after = own, after
        self._giver, self._taker = giver, taker
        self._finished_elsewhere = finished_elsewhere
        self._rounded_to = rounded_to
        self._wake, self._timeout_s, self._trace = wake, timeout_s, trace
        self.passes = 0

    def __iter__(self) -> Iterator[Delivery | Move]:
        while (batch := self._origin()) is not None:
            address, x = batch
            self._hear_of_finished()
            yield from self._given()
            yield from self._taken()
            # asked only now: what was just heard or moved may have left nobody who needs this batch
            ours = self._own.cursor == address
            theirs = self._after is not None and self._after.feed.cursor == address
            keep = set(self._own.boundaries_at(address)) if ours else set()
            if theirs:
                assert self._after is not None
                # before the pass: what it computes would else lie in memory beyond the window that plans count with
                self._wait_for(self._after, address)
                keep.add(self._after.boundary)
            if not keep:
                continue
            boundaries = self._teach(x, address, keep)
            if theirs:
                assert self._after is not None
                # the next rank before this one's units: it computes while they train
                self._after.send(address, boundaries[self._after.boundary])
                self._after.feed.advance()
                self._close_if_done()
            if ours:
                wanted = self._own.boundaries_at(address)
                self._own.advance()
                yield Delivery(address, {k: boundaries[k].to(self._rounded_to) for k in wanted})
        self._end()

    def finish(self, unit: int) -> None:
        self._own.finish(unit)
        if self._after is not None:
            # nothing may follow this unit: the ranks behind are let go now, not when this one comes to its own end
            self._after.feed.finish(unit)
            self._close_if_done()

    def _given(self) -> Iterator[Move]:
        """Give units to ranks that have run dry, between two training steps."""
        # A move names a step and looks lie between two steps: amid them there is no place that it could name.
        if self._giver is not None and (self._own.cursor is None or self._own.cursor.is_training):
            for move in self._giver.moves(self._own.remaining):
                self._own.finish(move.unit)
                yield move

    def _taken(self) -> Iterator[Move]:
        """Take units from ranks further on while this one has only their batches to pass on."""
        after, origin = self._after, self._origin
        if self._taker is None or after is None or not isinstance(origin, OwnBatches) or self._own.cursor is not None:
            return
        self._taker.seek(first_stretch=self._own.rank + 1)
        for move in self._taker.arrived():
            self._own.take(self._taker.span_of(move))
            # the unit needs nothing on the ranks behind any more: it is fed here
            after.feed.finish(move.unit)
            self._close_if_done()
            origin.lag()
            yield move

    def _hear_of_finished(self) -> None:
        for unit in self._finished_elsewhere():
            self.finish(unit)

    def _close_if_done(self) -> None:
        if self._after is not None and self._after.feed.cursor is None:
            self._after.close()

    def _end(self) -> None:
        """Nothing more comes: let the next ranks go."""
        if self._after is not None:
            self._after.close()
            with self._trace.span("wait", "for the last batches to be taken"):
                self._after.join()

    def _wait_for(self, after: Next, address: Address) -> None:
        if not after.slow:
            return
        start = time.perf_counter()
        while slow := after.slow:
            if time.perf_counter() - start > self._timeout_s:
                raise DistillError(
                    f"rank {self._own.rank}: rank {slow[0]} has taken no batch for {self._timeout_s:g} s; read "
                    f"logs/rank{slow[0]}.log, or raise plan.timeout_s"
                )
            self._wake.wait(WAKE_S)
            self._wake.clear()
        self._trace.since(start, "wait", "for a free slot", address.step)

    def _teach(self, x: Tensor, address: Address, keep: set[int]) -> dict[int, Tensor]:
        self.passes += 1
        with self._trace.span("teacher", "", address.step, on_device=True):
            return self._chain.run(x, first=self._first, last=max(keep), keep=keep)
