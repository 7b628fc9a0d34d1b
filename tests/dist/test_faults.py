"""What one rank's trouble does to the others, and what they say."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessContext, ProcessExitedException, ProcessRaisedException

from distill.blocks.chain import Boundary
from distill.distributed.edges.receiver import BoundaryReceiver
from distill.distributed.edges.sender import BoundarySender
from distill.distributed.edges.wire import Wire
from distill.distributed.store import LeaderFailedError, PeerLostError
from distill.distributed.transport import Edge, TransportError
from distill.engine import completion
from distill.observability.trace import Trace
from distill.planning.schedule import Address
from tests.dist import ranks
from tests.dist.ranks import TIMEOUT_S, Toy, connect, meet, run_ranks, run_toy, stop_heart, toy_rank


def test_a_block_whose_loss_is_nan_stops_alone_and_keeps_its_last_finite_weights(tmp_path: Path) -> None:
    toy = Toy(
        run_dir=str(tmp_path),
        owners=((0,), (1, 2, 3)),
        budgets=dict.fromkeys(range(4), 9),
        checkpoint_every=2,
        nan_at=(2, 5),
    )
    entries = run_toy(toy)
    assert (entries[2].status, entries[2].diverged_at, entries[2].steps) == ("diverged", 5, 4)
    assert [entries[block].steps for block in (0, 1, 3)] == [9, 9, 9]
    clean = run_toy(Toy(run_dir=str(tmp_path / "clean"), owners=toy.owners, budgets=toy.budgets))
    assert [entries[block].sha256 for block in (0, 1, 3)] == [clean[block].sha256 for block in (0, 1, 3)]


def follower_dies(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy, out: str) -> None:
    start = time.monotonic()
    try:
        toy_rank(rank, world_size, environment, toy)
    except TransportError as error:
        Path(out).write_text(f"{time.monotonic() - start:.1f} {error}")
        raise


def test_a_killed_rank_is_named_with_its_log(tmp_path: Path) -> None:
    out = tmp_path / "error.txt"
    toy = Toy(
        run_dir=str(tmp_path / "run"),
        owners=((0,), (1, 2, 3)),
        budgets=dict.fromkeys(range(4), 500),
        kill_at=(1, 3),
        slow={0: 0.01},
    )
    context = run_ranks(follower_dies, 2, toy, str(out), join=False)
    assert context is not None
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        _join(context)
    deadline = time.monotonic() + 20
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "rank 0: sending step" in out.read_text()
    assert "rank 1 failed" in out.read_text()
    assert "read logs/rank1.log" in out.read_text()


def mute(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    """Rank 1 lives, but does not get round to saying that its block is finished."""
    ranks.TIMEOUT_S = 3.0
    if rank == 1:
        completion.announce = lambda *_: time.sleep(12)
    toy_rank(rank, world_size, environment, toy)


def test_a_rank_that_has_had_its_last_batch_and_delivers_nothing_is_waited_for_until_the_deadline(
    tmp_path: Path,
) -> None:
    toy = Toy(run_dir=str(tmp_path), owners=((0,), (1,)), budgets={0: 3, 1: 3})
    with pytest.raises(ProcessRaisedException, match=r"rank 0: blocks \[1\] have not come for 3 s"):
        run_ranks(mute, 2, toy)


def test_both_neighbours_of_a_rank_killed_in_a_relay_name_it(tmp_path: Path) -> None:
    toy = Toy(
        run_dir=str(tmp_path / "run"),
        owners=((0,), (1, 2), (3,)),
        budgets=dict.fromkeys(range(4), 500),
        kill_at=(1, 3),
        strategy="relay",
        slow={0: 0.01},
    )
    contexts = run_ranks(neighbours_tell, 3, toy, str(tmp_path), join=False)
    assert contexts is not None
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        _join(contexts)
    for rank in (0, 2):
        told = tmp_path / f"{rank}.txt"
        deadline = time.monotonic() + 20
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert f"rank {rank}: " in told.read_text()
        assert "rank 1 failed" in told.read_text()
        assert "read logs/rank1.log" in told.read_text()


def neighbours_tell(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy, folder: str) -> None:
    follower_dies(rank, world_size, environment, toy, f"{folder}/{rank}.txt")


def _join(context: ProcessContext) -> None:
    while not context.join(grace_period=20):
        pass


BOUNDARY = {0: Boundary((4, 3), (3, 1), torch.float32)}
CPU_WIRE = {"device": torch.device("cpu"), "backend": "gloo"}


def old_generation(rank: int, world_size: int, environment: Mapping[str, str]) -> None:
    """Rank 0 sends as generation 1 over a connection that rank 1 takes for generation 2."""
    control = connect(rank, world_size, environment)
    store = control.address.connect()
    if rank == 0:
        sender = BoundarySender(
            OldEdge(0, 1, 1, 10.0),
            store,
            Wire(**CPU_WIRE),
            num_boundaries=1,
            window=2,
            on_free=lambda: None,
            trace=Trace(),
        )
        sender.send(Address(0), {0: torch.zeros(4, 3)})
        meet(control)
        return
    receiver = BoundaryReceiver(
        Edge(0, 1, 2, 10.0), store, Wire(**CPU_WIRE), boundaries=BOUNDARY, num_boundaries=1, trace=Trace()
    )
    with pytest.raises(TransportError, match="generation 1 from rank 0 came to generation 2"):
        receiver.next()
    meet(control)


class OldEdge(Edge):
    """An edge whose process believes to be generation 1, connected where generation 2 meets."""

    def connect(self, store: dist.Store, rank: int, *, backend: str = "gloo") -> object:
        return Edge(0, 1, 2, 10.0).connect(store, rank, backend=backend)


def test_a_message_of_an_older_generation_is_refused() -> None:
    run_ranks(old_generation, 2)


def silent_peer(rank: int, world_size: int, environment: Mapping[str, str]) -> None:
    """Rank 1 is alive until rank 0 has given it up, but its heart has stopped."""
    control = connect(rank, world_size, environment)
    control.timeout_s = 2.0
    if rank == 1:
        stop_heart(control)
    else:
        with pytest.raises(PeerLostError, match=r"rank 0: no plan from rank 1.*logs/rank1.log"):
            control.wait("plan", peer=1, purpose="plan")
    meet(control)


def test_a_wait_ends_when_the_peer_stops_beating() -> None:
    run_ranks(silent_peer, 2)


def leader_fails(rank: int, world_size: int, environment: Mapping[str, str]) -> None:
    control = connect(rank, world_size, environment)
    if rank == 0:
        control.set("failed", True)
        assert control.wait("mourned/1", peer=1, purpose="answer")
        return
    with pytest.raises(LeaderFailedError, match=r"rank 1: rank 0 has failed; read logs/rank0.log"):
        control.wait("plan", peer=0, purpose="plan")


def test_a_rank_that_waits_for_rank_0_hears_of_its_failure_and_says_so() -> None:
    run_ranks(leader_fails, 2)


def store_goes(rank: int, world_size: int, environment: Mapping[str, str], port: int) -> None:
    """Rank 0 serves the store itself, as without torchrun's agent, and vanishes."""
    own = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    control = connect(rank, world_size, {**environment, **own})
    if rank == 0:
        assert control.wait("here", peer=1, purpose="heartbeat")
        os._exit(0)
    control.set("here", True)
    with pytest.raises(LeaderFailedError, match=r"rank 1: the job's store is gone.*logs/rank0.log"):
        control.wait("plan", peer=0, purpose="plan")


def test_a_store_that_goes_with_rank_0_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(store_goes, 2, port)


def long_pause(rank: int, world_size: int, environment: Mapping[str, str]) -> None:
    """Rank 0 has nothing for rank 1 for twice the edge's time limit, as after a resume at uneven steps."""
    control = connect(rank, world_size, environment)
    store, edge = control.address.connect(), Edge(0, 1, 1, 2.0)
    meet(control)  # a process may take longer to start than that
    if rank == 0:
        sender = BoundarySender(
            edge, store, Wire(**CPU_WIRE), num_boundaries=1, window=2, on_free=lambda: None, trace=Trace()
        )
        time.sleep(5.0)
        sender.send(Address(7), {0: torch.ones(4, 3)})
        sender.close()
        sender.join()
        return
    receiver = BoundaryReceiver(edge, store, Wire(**CPU_WIRE), boundaries=BOUNDARY, num_boundaries=1, trace=Trace())
    delivery = receiver.next()
    assert delivery is not None
    assert delivery.address == Address(7)
    assert receiver.next() is None


def test_a_long_pause_of_a_living_sender_is_no_failure() -> None:
    run_ranks(long_pause, 2)


def never_connects(rank: int, world_size: int, environment: Mapping[str, str]) -> None:
    control, told = connect(rank, world_size, environment), threading.Event()
    store = control.address.connect()
    if rank == 0:
        sender = BoundarySender(
            Edge(0, 1, 1, 2.0), store, Wire(**CPU_WIRE), num_boundaries=1, window=2, on_free=told.set, trace=Trace()
        )
        sender.send(Address(0), {0: torch.zeros(4, 3)})
        assert told.wait(TIMEOUT_S)
        with pytest.raises(TransportError, match="rank 0: could not connect to rank 1"):
            _ = sender.ready
    meet(control)


def test_an_edge_to_a_rank_that_never_comes_has_a_deadline() -> None:
    run_ranks(never_connects, 2)
