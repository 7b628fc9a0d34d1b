"""Boundaries between two ranks of this host, by shared memory and by sockets: GB/s, CPU seconds a byte on either end.

    python benchmarks/wire.py [--megabytes 1 8 64] [--rounds 5] [--seconds 1]

Both ends are those of a run, one process each; the receiver reads nothing of what arrives. Ways alternate within every
round; medians over rounds. The CPU seconds are those of the whole process, beyond what connecting took.
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import summary, write

from distill.blocks.chain import Boundary
from distill.distributed.edges.receiver import BoundaryReceiver
from distill.distributed.edges.sender import BoundarySender
from distill.distributed.edges.wire import Wire
from distill.distributed.transport import Edge
from distill.observability.trace import Trace
from distill.planning.schedule import Address

WAYS = {"shared_memory": True, "sockets": False}
ROWS = 64
WINDOW = 4
WARM_BATCHES = 8
EDGE = Edge(0, 1, 1, 60.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(args.rounds):
        for megabytes in args.megabytes:
            for way in WAYS:
                one = _measure(megabytes * 1_000_000, way, args.seconds)
                found.setdefault(f"{megabytes} MB", {}).setdefault(way, []).append(one)
    result = {size: {way: _medians(runs) for way, runs in ways.items()} for size, ways in found.items()}
    write("wire", {"what": "one boundary a batch, two ranks of this host, one thread each", "sizes": result})


def _medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {key: summary([run[key] for run in runs]) for key in runs[0]}


def _measure(num_bytes: int, way: str, seconds: float) -> dict[str, float]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers: Any = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, args=(store.port, (num_bytes, way, seconds), answers), nprocs=2)
    return answers.get() | answers.get()


def _rank(rank: int, port: int, what: tuple[int, str, float], answers: Any) -> None:
    num_bytes, way, seconds = what
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    wire = Wire(device=torch.device("cpu"), backend="gloo", shared_memory=WAYS[way])
    form = Boundary((ROWS, num_bytes // 4 // ROWS), (num_bytes // 4 // ROWS, 1), torch.float32)
    answers.put((_send if rank == 0 else _receive)(store, wire, form, seconds))


def _send(store: dist.Store, wire: Wire, form: Boundary, seconds: float) -> dict[str, float]:
    free = threading.Semaphore(WINDOW)
    sender = BoundarySender(EDGE, store, wire, num_boundaries=1, window=WINDOW, on_free=free.release, trace=Trace())
    boundary = torch.rand(form.shape)
    step, started, cpu = 0, time.perf_counter(), time.process_time()
    while step < 3 * WARM_BATCHES or time.perf_counter() - started < seconds:
        free.acquire()
        if step == WARM_BATCHES:
            started, cpu = time.perf_counter(), time.process_time()
        sender.send(Address(step), {0: boundary})
        step += 1
    sender.close()
    sender.join()
    num_bytes = (step - WARM_BATCHES) * form.nbytes
    return {
        "gigabytes_per_s": num_bytes / (time.perf_counter() - started) / 1e9,
        "sender_cpu_ns_per_byte": (time.process_time() - cpu) / num_bytes * 1e9,
    }


def _receive(store: dist.Store, wire: Wire, form: Boundary, _: float) -> dict[str, float]:
    receiver = BoundaryReceiver(EDGE, store, wire, boundaries={0: form}, num_boundaries=1, trace=Trace())
    step, cpu = 0, time.process_time()
    while receiver.next() is not None:
        step += 1
        if step == WARM_BATCHES:
            cpu = time.process_time()
    return {"receiver_cpu_ns_per_byte": (time.process_time() - cpu) / ((step - WARM_BATCHES) * form.nbytes) * 1e9}


if __name__ == "__main__":
    main()
