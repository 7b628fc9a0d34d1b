"""The sending end of a data edge: a thread of its own, so that a slow or dead receiver costs one edge and no more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from distill.distributed.edges.shared_ring import SharedRing, accept_ring
from distill.distributed.edges.wire import HEADER_FIELDS, Wire, filled
from distill.distributed.transport import Edge, PairGroup, Store, TransportError, send_tensor
from distill.observability.trace import Trace
from distill.planning.network import RING_SLOTS
from distill.planning.schedule import Address

_Outgoing: TypeAlias = tuple[Address, dict[int, Tensor], "torch.cuda.Event | None"]  # the event: tensors are computed


class BoundarySender:
    """Rank 0's end of a data edge: at most `window` batches wait here for the receiver."""

    def __init__(
        self,
        edge: Edge,
        store: Store,
        wire: Wire,
        *,
        num_boundaries: int,
        window: int,
        on_free: Callable[[], None],
        trace: Trace,
    ) -> None:
        self._edge, self._store, self._wire, self._trace = edge, store, wire, trace
        self._num_boundaries = num_boundaries
        self._header_size = HEADER_FIELDS + num_boundaries
        self._ring: SharedRing | None = None
        self._num_batches = 0
        self._window = window
        self._on_free = on_free
        self._queue: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        self._outstanding = 0
        self._closed = False
        self._lock = threading.Lock()
        self._error: TransportError | None = None
        self.bytes_sent = 0
        self._thread = threading.Thread(target=self._run, name=f"send-{edge.target}", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether another batch may be handed over; raises what the thread met."""
        if self._error is not None:
            raise self._error
        with self._lock:
            return self._outstanding < self._window

    def send(self, address: Address, boundaries: Mapping[int, Tensor]) -> None:
        """Hand over a batch. The tensors, of the forms that the other end expects, must not be written to any more."""
        event = None
        if self._wire.stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        with self._lock:
            self._outstanding += 1
        self._queue.put((address, dict(sorted(boundaries.items())), event))

    def close(self) -> None:
        """Tell the receiver, after what is still queued, that nothing more comes; returns at once."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)

    def join(self) -> None:
        """Wait until the receiver of a closed edge has taken everything; raises what the thread met."""
        self._thread.join(self._edge.timeout_s)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise self._edge.broken(self._edge.source, "waiting for the last batch to be taken by", TimeoutError())

    def _run(self) -> None:
        edge, doing = self._edge, "connecting to"
        try:
            with self._wire.on_stream():
                headers, data = self._wire.connect(edge, self._store, edge.source)
                if self._wire.backend == "gloo":
                    self._ring = accept_ring(headers, num_boundaries=self._num_boundaries, slots=RING_SLOTS)
                while (item := self._next(headers)) is not None:
                    doing = f"sending step {item[0].step} to"
                    with self._trace.span("send", f"to rank {edge.target}", item[0].step):
                        self._send(headers, data, *item)
                    with self._lock:
                        self._outstanding -= 1
                    self._on_free()
                doing = "closing the edge to"
                headers.send([torch.full((self._header_size,), -1, dtype=torch.int64)], 1, 0).wait()
                data.shutdown()
            self._ring = None  # whoever asks for the bytes sent later must not keep the memory
        except TransportError as error:
            self._error = error
        except Exception as error:  # whatever it is, the main thread must hear of it
            self._error = edge.broken(edge.source, doing, error)
        self._on_free()

    def _next(self, headers: PairGroup) -> _Outgoing | None:
        """Wait for the next batch; in long pauses tell the receiver that this end is alive."""
        while True:
            try:
                return self._queue.get(timeout=self._edge.timeout_s / 4)
            except queue.Empty:
                self._send_header(headers, Address(0), 0, ())

    def _send_header(self, headers: PairGroup, address: Address, rows: int, boundaries: Iterable[int]) -> None:
        """Send a header as soon as the receiver has a free slot for what follows."""
        keys = tuple(boundaries)
        fields = [self._edge.generation, address.step, address.check, rows, len(keys), *keys]
        header = torch.full((self._header_size,), -1, dtype=torch.int64)
        header[: len(fields)] = torch.tensor(fields)
        headers.send([header], 1, 0).wait()

    def _send(
        self,
        headers: PairGroup,
        data: PairGroup,
        address: Address,
        boundaries: dict[int, Tensor],
        event: torch.cuda.Event | None,
    ) -> None:
        rows = next(iter(boundaries.values())).shape[0]
        self._send_header(headers, address, rows, boundaries)
        slot = self._num_batches % RING_SLOTS  # batches take turns; heartbeats take none
        self._num_batches += 1
        tensors = list(boundaries.values())
        self.bytes_sent += sum(tensor.nbytes for tensor in tensors)
        if self._ring is not None:
            for boundary, tensor in boundaries.items():
                self._ring.fill(slot, boundary, tensor)
            headers.send([filled()], 1, 0).wait()
            return
        if event is not None:
            assert self._wire.stream is not None
            self._wire.stream.wait_event(event)
            if self._wire.staged:
                tensors = [_to_pinned(tensor) for tensor in tensors]
                self._wire.stream.synchronize()
        works = [work for tensor in tensors for work in send_tensor(data, tensor)]
        for work in works:
            work.wait()
        if self._wire.stream is not None:
            self._wire.stream.synchronize()  # the tensors may go back to the allocator only now


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
