"""The receiving end of a data edge: a thread posts receives ahead into a fixed ring of buffers."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.blocks.chain import Boundary
from distill.distributed.edges.shared_ring import offer_ring
from distill.distributed.edges.wire import HEADER_FIELDS, Wire, boundary_over, empty_boundary, filled
from distill.distributed.transport import Edge, PairGroup, Store, TransportError, receive_tensor
from distill.observability.trace import Trace
from distill.planning.network import RING_SLOTS
from distill.planning.schedule import Address


@dataclass
class Delivery:
    """A received batch; without boundaries only a sign that the sender is alive. The tensors live in a ring buffer:
    they are valid until the next one is taken."""

    address: Address
    boundaries: dict[int, Tensor]
    slot: int = -1
    ready: torch.cuda.Event | None = None


class BoundaryReceiver:
    """The other end of a data edge: receives are posted ahead into a fixed ring of buffers."""

    def __init__(
        self,
        edge: Edge,
        store: Store,
        wire: Wire,
        *,
        boundaries: Mapping[int, Boundary],
        num_boundaries: int,
        trace: Trace,
        on_arrival: Callable[[], None] = lambda: None,
    ) -> None:
        self._edge, self._store, self._wire, self._trace = edge, store, wire, trace
        self._on_arrival = on_arrival
        self._num_boundaries = num_boundaries
        self._header_size = HEADER_FIELDS + num_boundaries
        self._boundaries = dict(boundaries)
        self._ring: list[dict[int, Tensor]] = []
        self._staging: list[dict[int, Tensor]] = []
        self._in_place = False  # whether the sender fills the ring itself
        self._free: queue.SimpleQueue[tuple[int, torch.cuda.Event | None]] = queue.SimpleQueue()
        for slot in range(RING_SLOTS):
            self._free.put((slot, None))
        self._ready: queue.SimpleQueue[Delivery | TransportError | None] = queue.SimpleQueue()
        self._seen: deque[Delivery | TransportError | None] = deque()  # out of the queue, but not taken yet
        self._in_use: int | None = None
        self._thread = threading.Thread(target=self._run, name="receive", daemon=True)
        self._thread.start()

    @property
    def arrived(self) -> bool:
        """Whether next() would return, or raise, at once."""
        while not self._seen:
            try:
                delivery = self._ready.get_nowait()
            except queue.Empty:
                return False
            if not _is_sign_of_life(delivery):
                self._seen.append(delivery)
        return True

    def next(self) -> Delivery | None:
        """Wait for the next batch and release the one before it; None when the sender has closed the edge."""
        self._release()
        while True:
            try:
                delivery = self._seen.popleft() if self._seen else self._ready.get(timeout=self._edge.timeout_s)
            except queue.Empty:
                raise self._edge.broken(self._edge.target, "waiting for a batch from", TimeoutError()) from None
            if isinstance(delivery, TransportError):
                raise delivery
            if not _is_sign_of_life(delivery):
                break
        if delivery is None:
            self._thread.join(self._edge.timeout_s)  # a process that ends while the connection is torn down is aborted
        else:
            self._in_use = delivery.slot
            if delivery.ready is not None:
                torch.cuda.current_stream(self._wire.device).wait_event(delivery.ready)
        return delivery

    def take_the_rest(self) -> None:
        """Drop what still comes, until the sender closes the edge."""
        while self.next() is not None:
            pass

    def _release(self) -> None:
        if self._in_use is None:
            return
        event = None
        if self._wire.stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # after what has been queued on the slot: it is free when that has run, which nobody waits for here
            event.record()
        self._free.put((self._in_use, event))
        self._in_use = None

    def _prepare(self, headers: PairGroup) -> None:
        """Make the ring: in memory that the sender maps too, where both are on one host, else of this rank's own."""
        wire = self._wire
        if wire.backend == "gloo":
            sizes = [0] * self._num_boundaries
            for k, boundary in self._boundaries.items():
                sizes[k] = boundary.nbytes
            shared = offer_ring(self._edge, headers, sizes, slots=RING_SLOTS, wanted=wire.shared_memory)
            if shared is not None:
                self._in_place = True
                self._ring = [
                    {k: boundary_over(shared.buffer(slot, k), b) for k, b in self._boundaries.items()}
                    for slot in range(RING_SLOTS)
                ]
                return
        self._ring = [self._buffers(wire.buffer_device) for _ in range(RING_SLOTS)]
        self._staging = [self._buffers(wire.device) for _ in range(RING_SLOTS)] if wire.staged else self._ring

    def _buffers(self, device: torch.device) -> dict[int, Tensor]:
        buffers = {k: empty_boundary(b, device) for k, b in self._boundaries.items()}
        if self._wire.staged and device.type == "cpu":
            return {k: buffer.pin_memory() for k, buffer in buffers.items()}
        return buffers

    def _run(self) -> None:
        edge, doing = self._edge, "connecting to"
        try:
            with self._wire.on_stream():
                headers, data = self._wire.connect(edge, self._store, edge.target)
                self._prepare(headers)
                doing = "receiving the first batch from"
                while (delivery := self._receive(headers, data)) is not None:
                    doing = f"receiving the batch after step {delivery.address.step} from"
                    self._ready.put(delivery)
                    self._on_arrival()
                data.shutdown()
            self._ready.put(None)
        except TransportError as error:
            self._ready.put(error)
        except Exception as error:  # whatever it is, the main thread must hear of it
            self._ready.put(edge.broken(edge.target, doing, error))
        self._on_arrival()

    def _receive(self, headers: PairGroup, data: PairGroup) -> Delivery | None:
        """Return the next batch, in the slot that has been free for longest: the sender counts on their turns, so that
        heartbeats must take none."""
        # before the header is asked for: a batch is let in only when it has a place, which is what holds the sender
        # back
        slot, consumed = self._free.get()
        while True:
            header = torch.empty(self._header_size, dtype=torch.int64)
            headers.recv([header], 0, 0).wait()
            generation, step, check, rows, count, *rest = header.tolist()
            if generation == -1:
                return None
            if generation != self._edge.generation:
                raise TransportError(
                    f"rank {self._edge.target}: a message of generation {generation} from rank {self._edge.source} "
                    f"came to generation {self._edge.generation}; an old process is still running"
                )
            if count:
                break
            self._ready.put(Delivery(Address(step, check), {}))  # only a heartbeat
            self._on_arrival()
        # as late as can be: kernels may still read the slot's last batch while the header is waited for
        if consumed is not None:
            consumed.synchronize()
        buffers = {k: self._ring[slot][k][:rows] for k in rest[:count]}
        with self._trace.span("receive", f"from rank {self._edge.source}", step):
            if not self._in_place:
                works = [work for tensor in buffers.values() for work in receive_tensor(data, tensor)]
                for work in works:
                    work.wait()
            elif buffers:
                headers.recv([filled()], 0, 0).wait()
        event = None
        if self._wire.stream is not None:
            buffers, event = self._arrived_on_device(slot, buffers)
        return Delivery(Address(step, check), buffers, slot, event)

    def _arrived_on_device(self, slot: int, buffers: dict[int, Tensor]) -> tuple[dict[int, Tensor], torch.cuda.Event]:
        """Copy staged buffers to the device; the event says when the batch may be read."""
        if self._wire.staged:
            targets = {k: self._staging[slot][k][: buffer.shape[0]] for k, buffer in buffers.items()}
            for k, buffer in buffers.items():
                targets[k].copy_(buffer, non_blocking=True)
            buffers = targets
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        if self._wire.staged:
            event.synchronize()  # the pinned buffers are free again
        return buffers, event


def _is_sign_of_life(delivery: Delivery | TransportError | None) -> bool:
    return isinstance(delivery, Delivery) and not delivery.boundaries
