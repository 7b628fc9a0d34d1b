"""A short look at a link: bandwidth, latency and what a byte costs its sender, over the very edges that a run uses."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice, pairwise

import torch

from distill.blocks.chain import Boundary
from distill.distributed.edges.receiver import BoundaryReceiver
from distill.distributed.edges.sender import BoundarySender
from distill.distributed.edges.wire import Wire
from distill.distributed.transport import Edge, Store
from distill.observability.trace import Trace
from distill.planning.schedule import Address

ROW_BYTES = 64 * 1024
ROWS = (1, 4, 16, 64, 128)  # of the batches that measure bandwidth: larger and larger ones up to 8 MiB, as time allows
REPEATS = 6
PAYLOADS = 8  # of the largest size, sent in turn: together more than a cache holds, as activations are
NUM_SMALL = 20  # batches of four bytes, which measure latency
PROBE_S = 0.3  # no further batches are sent after this long
WINDOW = 2
SMALL, LARGE = 0, 1
FORMS = {
    SMALL: Boundary((1, 1), (1, 1), torch.float32),
    LARGE: Boundary((ROWS[-1], ROW_BYTES // 4), (ROW_BYTES // 4, 1), torch.float32),
}


@dataclass(frozen=True)
class Arrivals:
    """What the receiver sees: bytes per second of REPEATS of the largest batches at their best, as a busy moment is not
    the link's fault, and the seconds that a batch of hardly any bytes usually takes."""

    bytes_per_s: float
    latency_s: float


class _Pacer:
    """Sends batches through an edge, at most WINDOW ahead."""

    def __init__(self, edge: Edge, store: Store, wire: Wire) -> None:
        self._edge, self._free, self._step = edge, threading.Semaphore(WINDOW), 0
        self._sender = BoundarySender(
            edge, store, wire, num_boundaries=len(FORMS), window=WINDOW, on_free=self._free.release, trace=Trace()
        )

    def send(self, boundary: int, tensors: Iterable[torch.Tensor]) -> None:
        """Send a batch of each; returns when all are taken."""
        for tensor in tensors:
            self._wait(1)
            self._sender.send(Address(self._step), {boundary: tensor})
            self._step += 1
        self._wait(WINDOW)
        self._free.release(WINDOW)

    def close(self) -> None:
        self._sender.close()
        self._sender.join()

    def _wait(self, slots: int) -> None:
        for _ in range(slots):
            if not self._free.acquire(timeout=self._edge.timeout_s):
                raise self._edge.broken(self._edge.source, "probing the link to", TimeoutError())
        _ = self._sender.ready  # raises what the thread met


def probe_from(edge: Edge, store: Store, wire: Wire) -> float:
    """Source of the edge: send for about a third of a second; return the CPU seconds that a byte costs this process."""
    # written to: memory that was only ever asked for is one page of zeros, read from the nearest cache
    payloads = cycle([torch.ones(ROWS[-1], ROW_BYTES // 4, device=wire.device) for _ in range(PAYLOADS)])
    pacer = _Pacer(edge, store, wire)
    pacer.send(SMALL, [torch.zeros(1, 1, device=wire.device)] * NUM_SMALL)
    started, sizes = time.perf_counter(), iter(ROWS)
    prices: dict[int, list[float]] = {}
    rows = 0
    while not prices or time.perf_counter() - started < PROBE_S:
        rows = next(sizes, rows)
        before = time.process_time()
        pacer.send(LARGE, [payload[:rows] for payload in islice(payloads, REPEATS)])
        prices.setdefault(rows, []).append((time.process_time() - before) / (REPEATS * rows * ROW_BYTES))
    pacer.close()
    return statistics.median(prices[rows])


def probe_to(edge: Edge, store: Store, wire: Wire) -> Arrivals:
    """Target of the edge: receive what probe_from() sends, and time it."""
    receiver = BoundaryReceiver(edge, store, wire, boundaries=FORMS, num_boundaries=len(FORMS), trace=Trace())
    arrivals: dict[int, list[float]] = {}  # by size, each REPEATS times without a pause
    while (delivery := receiver.next()) is not None:
        size = sum(tensor.nbytes for tensor in delivery.boundaries.values())
        arrivals.setdefault(size, []).append(time.perf_counter())
    largest, small = max(arrivals), arrivals[min(arrivals)]
    runs = zip(arrivals[largest][::REPEATS], arrivals[largest][REPEATS - 1 :: REPEATS], strict=True)
    return Arrivals(
        bytes_per_s=(REPEATS - 1) * largest / min(last - first for first, last in runs),
        latency_s=statistics.median(after - before for before, after in pairwise(small)),
    )


def copy_price() -> float:
    """Return the seconds in which this rank copies a byte to other memory: what sending costs within a host."""
    sources = [torch.ones(ROWS[-1] * ROW_BYTES, dtype=torch.uint8).numpy() for _ in range(PAYLOADS)]
    target = sources[0].copy()
    times = []
    for source in sources:
        before = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - before)
    return statistics.median(times) / target.nbytes
