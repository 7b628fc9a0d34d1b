"""Both ends of one edge, here in one process: window, wake-ups, heartbeats, large tensors and deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distill.blocks.chain import Boundary
from distill.distributed.edges.receiver import BoundaryReceiver
from distill.distributed.edges.sender import BoundarySender
from distill.distributed.edges.wire import Wire
from distill.distributed.transport import CHUNK_BYTES, Averager, Edge, TransportError, wire_backend
from distill.observability.trace import Trace
from distill.planning.network import RING_SLOTS
from distill.planning.schedule import Address

BATCH = {0: torch.arange(12.0).reshape(4, 3)}
FORMS = {0: Boundary((4, 3), (3, 1), torch.float32)}


def wire() -> Wire:
    return Wire(device=torch.device("cpu"), backend="gloo", shared_memory=False)


class StuckWire(Wire):
    """A wire on which neither end comes any further, and no time limit of the transport's passes."""

    def connect(self, *_: object) -> Any:
        time.sleep(5.0)


def stuck() -> Wire:
    return StuckWire(device=torch.device("cpu"), backend="gloo")


def sender(
    store: dist.Store, edge: Edge, *, over: Wire | None = None, on_free: Callable[[], None] = lambda: None
) -> BoundarySender:
    return BoundarySender(edge, store, over or wire(), num_boundaries=1, window=2, on_free=on_free, trace=Trace())


def receiver(
    store: dist.Store,
    edge: Edge,
    *,
    over: Wire | None = None,
    forms: dict[int, Boundary] = FORMS,
    on_arrival: Callable[[], None] = lambda: None,
) -> BoundaryReceiver:
    return BoundaryReceiver(
        edge, store, over or wire(), boundaries=forms, num_boundaries=1, trace=Trace(), on_arrival=on_arrival
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_window_of_two_is_full_with_two_batches_until_one_is_taken() -> None:
    store, edge, freed = dist.HashStore(), Edge(0, 1, 1, 20.0), threading.Semaphore(0)
    sending = sender(store, edge, on_free=freed.release)
    for step in range(2):
        assert sending.ready
        sending.send(Address(step), BATCH)
    assert not sending.ready
    taking = receiver(store, edge)
    assert taking.next() is not None
    assert freed.acquire(timeout=10), "nobody is told that the window has headroom"
    assert sending.ready
    sending.close()
    taking.take_the_rest()
    sending.join()


def test_who_waits_is_woken_when_the_edge_breaks_and_joining_says_why() -> None:
    freed = threading.Event()
    sending = sender(dist.HashStore(), Edge(0, 1, 1, 0.5), on_free=freed.set)
    sending.send(Address(0), BATCH)
    assert freed.wait(10)
    with pytest.raises(TransportError, match="rank 0: could not connect to rank 1"):
        sending.join()


def test_the_end_of_an_edge_is_told_once_its_thread_is_done() -> None:
    store, edge, done = dist.HashStore(), Edge(0, 1, 1, 20.0), threading.Event()

    def slow() -> None:
        time.sleep(0.2)
        done.set()

    taking = receiver(store, edge, on_arrival=slow)
    sender(store, edge).close()
    assert taking.next() is None
    assert done.is_set()


def test_signs_of_life_are_no_arrival_and_take_no_slot() -> None:
    store, edge = dist.HashStore(), Edge(0, 1, 1, 3.0)  # a sign comes four times in that
    arrival = threading.Event()
    sending, taking = sender(store, edge), receiver(store, edge, on_arrival=arrival.set)
    for _ in range(RING_SLOTS + 1):
        assert arrival.wait(10), "no heartbeat, or no slot for it"
        arrival.clear()
        assert not taking.arrived
    sending.send(Address(7), BATCH)
    until(lambda: taking.arrived)
    delivery = taking.next()
    assert delivery is not None
    assert delivery.address == Address(7)
    assert torch.equal(delivery.boundaries[0], BATCH[0])
    sending.close()
    taking.take_the_rest()


@pytest.mark.parametrize("shared_memory", [True, False])
def test_signs_of_life_while_a_slot_is_in_use_change_no_batch(shared_memory: bool) -> None:
    over = Wire(device=torch.device("cpu"), backend="gloo", shared_memory=shared_memory)
    store, edge, arrival = dist.HashStore(), Edge(0, 1, 1, 3.0), threading.Event()
    sending, taking = sender(store, edge, over=over), receiver(store, edge, over=over, on_arrival=arrival.set)
    got = []
    for first in range(0, 4 * RING_SLOTS, RING_SLOTS):
        for number in range(first, first + RING_SLOTS):
            until(lambda: sending.ready)
            sending.send(Address(number), {0: torch.full((4, 3), float(number))})
            delivery = taking.next()
            assert delivery is not None
            got.append(delivery.boundaries[0].mean().item())
        for _ in range(1 + first % 2):  # while the last batch is in use
            arrival.clear()
            assert arrival.wait(10), "no heartbeat"
            assert not taking.arrived
        assert delivery.boundaries[0].mean().item() == got[-1]
    assert got == [*map(float, range(4 * RING_SLOTS))]
    sending.close()
    taking.take_the_rest()
    sending.join()


def test_what_is_larger_than_a_chunk_arrives_whole() -> None:
    store, edge = dist.HashStore(), Edge(0, 1, 1, 20.0)
    rows = CHUNK_BYTES // 1024 * 2 + 3
    large = torch.arange(rows * 256.0).reshape(rows, 256)
    sending = sender(store, edge)
    taking = receiver(store, edge, forms={0: Boundary((rows, 256), (256, 1), torch.float32)})
    sending.send(Address(0), {0: large})
    delivery = taking.next()
    assert delivery is not None
    assert torch.equal(delivery.boundaries[0], large)
    sending.close()
    taking.take_the_rest()


def test_both_ends_let_what_is_under_way_come_to_its_end() -> None:
    left = []

    class Noted(Wire):
        def connect(self, edge: Edge, store: dist.Store, rank: int) -> Any:
            headers, data = super().connect(edge, store, rank)
            return headers, mock.Mock(wraps=data, shutdown=lambda: left.append(rank))

    def noted() -> Wire:
        return Noted(device=torch.device("cpu"), backend="gloo", shared_memory=False)

    store, edge = dist.HashStore(), Edge(0, 1, 1, 20.0)
    sending, taking = sender(store, edge, over=noted()), receiver(store, edge, over=noted())
    sending.send(Address(0), BATCH)
    sending.close()
    taking.take_the_rest()
    sending.join()
    assert sorted(left) == [0, 1]


def test_ends_of_different_generations_do_not_meet() -> None:
    store, told = dist.HashStore(), threading.Semaphore(0)
    sending = sender(store, Edge(0, 1, 1, 0.5), on_free=told.release)
    taking = receiver(store, Edge(0, 1, 2, 0.5), on_arrival=told.release)
    assert told.acquire(timeout=10)
    assert told.acquire(timeout=10)
    with pytest.raises(TransportError, match="rank 1: could not connect to rank 0"):
        taking.next()
    with pytest.raises(TransportError, match="rank 0: could not connect to rank 1"):
        sending.join()


def test_waiting_for_the_other_end_has_a_deadline_of_its_own() -> None:
    edge = Edge(0, 1, 1, 0.3)
    with pytest.raises(TransportError, match="rank 0: waiting for the last batch to be taken by rank 1 failed"):
        sender(dist.HashStore(), edge, over=stuck()).join()
    with pytest.raises(TransportError, match="rank 1: waiting for a batch from rank 0 failed"):
        receiver(dist.HashStore(), edge, over=stuck()).next()


def test_nccl_is_for_ranks_with_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert [wire_backend(gpu, local_world_size=ranks) for ranks in (1, 2, 3)] == ["nccl", "nccl", "gloo"]
    assert wire_backend(cpu, local_world_size=1) == "gloo"


def test_a_rank_counts_in_a_mean_by_its_share_of_the_rows() -> None:
    store = dist.HashStore()

    def mean(rank: int) -> list[torch.Tensor]:
        share = (0.25, 0.75)[rank]
        average = Averager(store, rank=rank, group=(0, 1), share=share, timeout_s=20.0, backend="gloo")
        tensors = [torch.full((2, 3), 4.0 * rank), torch.tensor([8.0 - 4.0 * rank])]
        average(tensors)()
        return tensors

    with ThreadPoolExecutor(2) as ranks:
        for matrix, scalar in ranks.map(mean, range(2)):
            assert torch.equal(matrix, torch.full((2, 3), 3.0))
            assert scalar.item() == 5.0
