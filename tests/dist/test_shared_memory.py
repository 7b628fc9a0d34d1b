"""Boundaries through memory that ranks of one host share: the same bits, in place, and a way out where it cannot be."""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from distill.blocks.chain import Boundary
from distill.distributed.edges.receiver import BoundaryReceiver
from distill.distributed.edges.sender import BoundarySender
from distill.distributed.edges.shared_ring import SharedRing
from distill.distributed.edges.wire import Wire
from distill.distributed.transport import Edge, TransportError
from distill.observability.trace import Trace
from distill.planning.schedule import Address
from distill.storage.ledger import Ledger
from tests.dist.ranks import Toy, connect, meet, run_ranks, toy_rank

ROWS, SHAPE = 6, (6, 5, 4, 4)
FORMS = {
    0: Boundary(SHAPE, (80, 1, 20, 5), torch.bfloat16),  # channels_last
    2: Boundary((ROWS, 7), (7, 1), torch.bfloat16),
    3: Boundary(SHAPE, (80, 16, 4, 1), torch.bfloat16),
}
LIMIT_S = 4.0


def batch(step: int) -> dict[int, torch.Tensor]:
    """What is sent at a step: not always the same boundaries, nor as many rows."""
    generator = torch.Generator().manual_seed(step)
    rows = ROWS - step % 3
    return {
        k: form.conform(torch.randn((rows, *form.shape[1:]), generator=generator).to(form.dtype))
        for k, form in FORMS.items()
        if k == 0 or step % (k + 1)
    }


def maps_shared_memory() -> bool:
    return "memfd:distill" in Path("/proc/self/maps").read_text()


def wire(shared_memory: bool = True) -> Wire:
    device = torch.device("cpu")
    return Wire(device=device, backend="gloo", shared_memory=shared_memory)


def open_sender(edge: Edge, store: torch.distributed.Store, shared_memory: bool = True) -> BoundarySender:
    return BoundarySender(
        edge, store, wire(shared_memory), num_boundaries=4, window=2, on_free=lambda: None, trace=Trace()
    )


def open_receiver(edge: Edge, store: torch.distributed.Store, shared_memory: bool = True) -> BoundaryReceiver:
    return BoundaryReceiver(edge, store, wire(shared_memory), boundaries=FORMS, num_boundaries=4, trace=Trace())


def exchange(rank: int, world_size: int, environment: Mapping[str, str], how: str, log: str) -> None:
    """Rank 0 streams batches with pauses long enough for heartbeats; rank 1 must see exactly them, where `how`
    says."""
    logging.basicConfig(filename=log if rank else None, level=logging.INFO)
    if rank == 1 and how == "another host":
        socket.gethostname = lambda: "elsewhere"
    if rank == 1 and how == "no memory":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    control = connect(rank, world_size, environment)
    store, edge = control.address.connect(), Edge(0, 1, 1, LIMIT_S)
    meet(control)  # a process may take longer to start than that
    if rank == 0:
        sender = open_sender(edge, store, how != "off")
        for step in range(12):
            while not sender.ready:
                time.sleep(0.001)
            sender.send(Address(step), batch(step))
            time.sleep(1.5 * LIMIT_S / 4 if step % 5 == 2 else 0.0)
        sender.close()
        sender.join()
        return
    receiver = open_receiver(edge, store, how != "off")
    for step in range(12):
        delivery = receiver.next()
        assert delivery is not None
        assert delivery.address == Address(step)
        expected = batch(step)
        assert delivery.boundaries.keys() == expected.keys()
        time.sleep(0.02)  # the next batches come meanwhile, and must not come over this one
        for k, tensor in delivery.boundaries.items():
            assert torch.equal(tensor, expected[k])
            assert tensor.stride() == expected[k].stride()
    assert maps_shared_memory() == (how == "shared")
    assert receiver.next() is None


@pytest.mark.parametrize("how", ["shared", "off", "another host", "no memory"])
def test_batches_arrive_unchanged_in_place_or_over_sockets(tmp_path: Path, how: str) -> None:
    log = tmp_path / "log"
    run_ranks(exchange, 2, how, str(log))
    told = "rank 1 shares no memory with rank 0 (File too large): activations come over sockets" in log.read_text()
    assert told == (how == "no memory")


def notes_memory(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    usual, made = os.memfd_create, list[str]()

    def noted(name: str) -> int:
        made.append(name)
        return usual(name)

    os.memfd_create = noted
    toy_rank(rank, world_size, environment, toy)
    (Path(toy.run_dir) / f"memories{rank}").write_text(str(len(made)))


@pytest.mark.parametrize(("strategy", "owners"), [("broadcast", ((0,), (1, 2), (3,))), ("relay", ((0, 1), (2,), (3,)))])
def test_students_have_the_same_bits_with_and_without(
    tmp_path: Path, strategy: str, owners: tuple[tuple[int, ...], ...]
) -> None:
    bits = []
    for shared in (True, False):
        run_dir = tmp_path / f"{shared}"
        run_ranks(notes_memory, 3, Toy(run_dir=str(run_dir), owners=owners, strategy=strategy, shared_memory=shared))
        assert [int((run_dir / f"memories{rank}").read_text()) for rank in range(3)] == [0, shared, shared]
        bits.append({block: entry.sha256 for block, entry in Ledger(run_dir).entries.items()})
    assert len(bits[0]) == 4
    assert bits[0] == bits[1]


def sender_vanishes(rank: int, world_size: int, environment: Mapping[str, str], out: str) -> None:
    """Rank 0 is killed after the header, with the memory half filled."""
    store = connect(rank, world_size, environment).address.connect()
    edge = Edge(0, 1, 1, 60.0)
    if rank == 0:
        SharedRing.fill = lambda *_: os._exit(9)  # type: ignore[assignment]
        open_sender(edge, store).send(Address(0), batch(0))
        time.sleep(60)
    receiver = open_receiver(edge, store)
    with pytest.raises(TransportError, match="rank 1: receiving the first batch from rank 0 failed"):
        receiver.next()
    Path(out).write_text("heard")


def test_a_sender_killed_while_it_fills_the_memory_is_noticed_at_once(tmp_path: Path) -> None:
    context = run_ranks(sender_vanishes, 2, str(tmp_path / "out"), join=False)
    assert context is not None
    deadline = time.monotonic() + 20
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "out").read_text() == "heard"
    for process in context.processes:
        process.join(10)
