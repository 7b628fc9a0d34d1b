"""Moves tensors between ranks: one two-rank process group per edge and direction. Besides finetune.py the only user of
torch.distributed's process groups.

A message is a header (generation, step, check, rows, boundaries) and then the boundaries themselves, in chunks of at
most 512 KiB over gloo: a peer that dies between small messages is noticed at once, one that dies in the middle of a
large message only when the group's timeout passes. Every edge has a thread of its own on both ends, so that a dead or
slow peer costs one edge and nothing else.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from distill.blocks import Boundary
from distill.errors import DistillError
from distill.protocol import Address
from distill.trace import Trace

CHUNK_BYTES = 512 * 1024
HEADER_FIELDS = 5  # generation, step, check, rows, number of boundaries; then the boundaries
RING_SLOTS = 2  # receive buffers: one being trained on, one being filled

PairGroup: TypeAlias = Any  # ProcessGroupGloo or ProcessGroupNCCL, whose stubs lack send() and recv()


class TransportError(DistillError):
    """A peer could not be reached, died, or sent what was not expected."""


@dataclass(frozen=True)
class Edge:
    """One direction between two ranks, and what both ends must agree on."""

    source: int
    target: int
    generation: int
    timeout_s: float
    name: str = "boundaries"

    def connect(self, store: dist.Store, rank: int, *, backend: str = "gloo") -> PairGroup:
        """Return the two-rank group of this edge as seen from `rank` (one of the two). Blocks until both call it."""
        prefix = dist.PrefixStore(f"edge/{self.generation}/{self.name}/{self.source}-{self.target}/{backend}", store)
        position, timeout = int(rank == self.target), timedelta(seconds=self.timeout_s)
        try:
            if backend == "nccl":
                return dist.ProcessGroupNCCL(prefix, position, 2, timeout)  # type: ignore[arg-type]
            return dist.ProcessGroupGloo(prefix, position, 2, timeout)
        except RuntimeError as error:
            other = self.source if rank == self.target else self.target
            raise TransportError(f"rank {rank}: could not connect to rank {other}: {_reason(error)}") from error

    def broken(self, rank: int, doing: str, error: BaseException) -> TransportError:
        """Return the error for a transfer that failed on `rank`: who waited for whom, for what, and where to look."""
        other = self.source if rank == self.target else self.target
        return TransportError(
            f"rank {rank}: {doing} rank {other} failed ({_reason(error)}); read logs/rank{other}.log, "
            f"or raise plan.timeout_s ({self.timeout_s:g} s) if that rank was only slow"
        )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit("] ", 1)[-1]


def flat(tensor: Tensor) -> Tensor:
    """Return the storage of a dense tensor, in memory order, as one dimension; no copy. Its stride order is kept by
    the receiver's buffer, so that both ends compute with the same memory layout and hence the same bits."""
    return tensor.as_strided((tensor.numel(),), (1,))


def empty_boundary(boundary: Boundary, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor with the boundary's shape and strides."""
    return torch.empty_strided(boundary.shape, boundary.stride, dtype=dtype, device=device)


def send_tensor(group: PairGroup, tensor: Tensor) -> list[dist.Work]:
    """Start sending a dense tensor over `group`; wait for every returned work exactly once."""
    pieces = flat(tensor).view(torch.uint8)
    if tensor.is_cuda:
        return [group.send([pieces], 1, 0)]
    return [group.send([piece], 1, tag) for tag, piece in enumerate(torch.split(pieces, CHUNK_BYTES), start=1)]


def receive_tensor(group: PairGroup, tensor: Tensor) -> list[dist.Work]:
    """Start receiving into a dense tensor; the mirror of send_tensor()."""
    pieces = flat(tensor).view(torch.uint8)
    if tensor.is_cuda:
        return [group.recv([pieces], 0, 0)]
    return [group.recv([piece], 0, tag) for tag, piece in enumerate(torch.split(pieces, CHUNK_BYTES), start=1)]


class Wire:
    """How boundaries travel between devices: dtype, and whether CUDA tensors go by NCCL or are staged for gloo."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, backend: str) -> None:
        self.dtype = dtype
        self.device = device
        self.backend = backend
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run what is inside on this wire's device and side stream; nothing to do on the CPU."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def connect(self, edge: Edge, store: dist.Store, rank: int) -> tuple[PairGroup, PairGroup]:
        """Return the edge's groups for headers (always gloo, so that reading one needs no GPU) and for boundaries."""
        headers = edge.connect(store, rank)
        return headers, edge.connect(store, rank, backend="nccl") if self.backend == "nccl" else headers

    @property
    def staged(self) -> bool:
        return self.device.type == "cuda" and self.backend == "gloo"

    @property
    def buffer_device(self) -> torch.device:
        return torch.device("cpu") if self.staged else self.device


_Outgoing: TypeAlias = tuple[Address, dict[int, Tensor], "torch.cuda.Event | None"]  # the event: tensors are computed


class BoundarySender:
    """Rank 0's end of a data edge: at most `window` batches wait here for the receiver."""

    def __init__(
        self,
        edge: Edge,
        store: dist.Store,
        wire: Wire,
        *,
        num_boundaries: int,
        window: int,
        on_free: Callable[[], None],
        trace: Trace,
    ) -> None:
        self._edge, self._store, self._wire, self._trace = edge, store, wire, trace
        self._header_size = HEADER_FIELDS + num_boundaries
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
        """Hand over a batch. The tensors, already in the wire's dtype, must not be written to afterwards."""
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
                while (item := self._next(headers)) is not None:
                    doing = f"sending step {item[0].step} to"
                    with self._trace.span("send", f"to rank {edge.target}", item[0].step):
                        self._send(headers, data, *item)
                    with self._lock:
                        self._outstanding -= 1
                    self._on_free()
                doing = "closing the edge to"
                headers.send([torch.full((self._header_size,), -1, dtype=torch.int64)], 1, 0).wait()
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
                headers.send([self._header(Address(0), 0, ())], 1, 0).wait()

    def _header(self, address: Address, rows: int, boundaries: Iterable[int]) -> Tensor:
        keys = tuple(boundaries)
        fields = [self._edge.generation, address.step, address.check, rows, len(keys), *keys]
        header = torch.full((self._header_size,), -1, dtype=torch.int64)
        header[: len(fields)] = torch.tensor(fields)
        return header

    def _send(
        self,
        headers: PairGroup,
        data: PairGroup,
        address: Address,
        boundaries: dict[int, Tensor],
        event: torch.cuda.Event | None,
    ) -> None:
        rows = next(iter(boundaries.values())).shape[0]
        headers.send([self._header(address, rows, boundaries)], 1, 0).wait()
        tensors = list(boundaries.values())
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
        self.bytes_sent += sum(tensor.nbytes for tensor in tensors)


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


@dataclass
class Delivery:
    """A received batch. The tensors live in a ring buffer: they are valid until the next one is taken."""

    address: Address
    boundaries: dict[int, Tensor]
    slot: int = -1
    ready: torch.cuda.Event | None = None


class BoundaryReceiver:
    """The other end of a data edge: receives are posted ahead into a fixed ring of buffers."""

    def __init__(
        self,
        edge: Edge,
        store: dist.Store,
        wire: Wire,
        *,
        boundaries: Mapping[int, Boundary],
        num_boundaries: int,
        trace: Trace,
        on_arrival: Callable[[], None] = lambda: None,
    ) -> None:
        self._edge, self._store, self._wire, self._trace = edge, store, wire, trace
        self._on_arrival = on_arrival
        self._header_size = HEADER_FIELDS + num_boundaries
        self._boundaries = dict(boundaries)
        self._ring = [self._buffers(wire.buffer_device) for _ in range(RING_SLOTS)]
        self._staging = [self._buffers(wire.device) for _ in range(RING_SLOTS)] if wire.staged else self._ring
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
            if isinstance(delivery, Delivery) and not delivery.boundaries:
                self._free.put((delivery.slot, None))  # only a sign of life
            else:
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
            if delivery is None or delivery.boundaries:
                break
            self._free.put((delivery.slot, None))  # only a sign of life
        if delivery is not None:
            self._in_use = delivery.slot
            if delivery.ready is not None:
                torch.cuda.current_stream(self._wire.device).wait_event(delivery.ready)
        return delivery

    def _release(self) -> None:
        if self._in_use is None:
            return
        event = None
        if self._wire.stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._free.put((self._in_use, event))
        self._in_use = None

    def _buffers(self, device: torch.device) -> dict[int, Tensor]:
        buffers = {k: empty_boundary(b, self._wire.dtype, device) for k, b in self._boundaries.items()}
        if self._wire.staged and device.type == "cpu":
            return {k: buffer.pin_memory() for k, buffer in buffers.items()}
        return buffers

    def _run(self) -> None:
        edge, doing = self._edge, "connecting to"
        try:
            with self._wire.on_stream():
                headers, data = self._wire.connect(edge, self._store, edge.target)
                doing = "receiving the first batch from"
                while (delivery := self._receive(headers, data)) is not None:
                    doing = f"receiving the batch after step {delivery.address.step} from"
                    self._ready.put(delivery)
                    self._on_arrival()
            self._ready.put(None)
        except TransportError as error:
            self._ready.put(error)
        except Exception as error:  # whatever it is, the main thread must hear of it
            self._ready.put(edge.broken(edge.target, doing, error))
        self._on_arrival()

    def _receive(self, headers: PairGroup, data: PairGroup) -> Delivery | None:
        slot, consumed = self._free.get()
        header = torch.empty(self._header_size, dtype=torch.int64)
        headers.recv([header], 0, 0).wait()
        generation, step, check, rows, count, *rest = header.tolist()
        if generation == -1:
            return None
        if generation != self._edge.generation:
            raise TransportError(
                f"rank {self._edge.target}: a message of generation {generation} from rank {self._edge.source} came to "
                f"generation {self._edge.generation}; an old process is still running"
            )
        if consumed is not None:
            consumed.synchronize()
        buffers = {k: self._ring[slot][k][:rows] for k in rest[:count]}
        with self._trace.span("receive", f"from rank {self._edge.source}", step):
            works = [work for tensor in buffers.values() for work in receive_tensor(data, tensor)]
            for work in works:
                work.wait()
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


class Averager:
    """Means over all ranks, by one all-reduce of everything flattened."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, timeout_s: float, backend: str) -> None:
        """Blocks until every rank has made its own."""
        prefix, timeout = dist.PrefixStore(f"average/{backend}", store), timedelta(seconds=timeout_s)
        make = dist.ProcessGroupNCCL if backend == "nccl" else dist.ProcessGroupGloo
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._group: Any = make(prefix, rank, world_size, timeout)  # type: ignore[arg-type]

    def __call__(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its mean; all ranks must call with tensors of the same sizes."""
        joined = torch.cat([flat(tensor) for tensor in tensors])
        try:
            self._group.allreduce([joined]).wait()
        except RuntimeError as error:
            raise TransportError(
                f"rank {self._rank}: averaging gradients failed ({_reason(error)}); read the other ranks' logs, or "
                f"raise plan.timeout_s ({self._timeout_s:g} s)"
            ) from error
        joined /= self._world_size
        for tensor, mean in zip(tensors, torch.split(joined, [tensor.numel() for tensor in tensors]), strict=True):
            flat(tensor).copy_(mean)


def send_blob(group: PairGroup, blob: bytes) -> None:
    """Send bytes whose length the receiver knows (finished weights); returns when they have arrived."""
    for work in send_tensor(group, torch.frombuffer(bytearray(blob), dtype=torch.uint8)):
        work.wait()


def receive_blob(group: PairGroup, size: int) -> bytes:
    """Receive `size` bytes sent by send_blob()."""
    buffer = torch.empty(size, dtype=torch.uint8)
    for work in receive_tensor(group, buffer):
        work.wait()
    return buffer.numpy().tobytes()


def wire_backend(device: torch.device, *, local_world_size: int) -> str:
    """Return "nccl" where every rank of this node has a GPU of its own, else "gloo" (NCCL refuses to share one)."""
    if device.type != "cuda" or local_world_size > torch.cuda.device_count():
        return "gloo"
    return "nccl"
