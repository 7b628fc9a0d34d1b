"""What needs a CUDA device: the same job on it, NCCL edges, and gloo edges staged for ranks that share one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from distill.blocks.chain import Boundary
from distill.distributed.edges.receiver import BoundaryReceiver
from distill.distributed.edges.sender import BoundarySender
from distill.distributed.edges.wire import Wire
from distill.distributed.transport import Edge
from distill.observability.trace import Trace
from distill.planning.schedule import Address
from tests.dist.ranks import connect, run_ranks
from tests.e2e.command import FINISHED, distill, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPE = (32, 16, 8, 8)
STRIDE = (16 * 64, 1, 16 * 8, 16)  # channels_last


def batch(step: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SHAPE, generator=generator).to(device, memory_format=torch.channels_last)


def exchange(rank: int, world_size: int, environment: Mapping[str, str], backend: str) -> None:
    """Rank 0 streams ten CUDA batches; rank 1 must see exactly them, also while its own stream is busy."""
    device = torch.device("cuda", rank if backend == "nccl" else 0)
    torch.cuda.set_device(device)
    store = connect(rank, world_size, environment).address.connect()
    edge, wire = Edge(0, 1, 1, 60.0), Wire(device=device, backend=backend)
    if rank == 0:
        sender = BoundarySender(edge, store, wire, num_boundaries=2, window=2, on_free=lambda: None, trace=Trace())
        for step in range(10):
            sender.send(Address(step), {1: batch(step, device)})
        sender.close()
        sender.join()
        return
    boundaries = {1: Boundary(SHAPE, STRIDE, torch.float32)}
    receiver = BoundaryReceiver(edge, store, wire, boundaries=boundaries, num_boundaries=2, trace=Trace())
    sums = []
    while (delivery := receiver.next()) is not None:
        received = delivery.boundaries[1]
        assert received.stride() == STRIDE
        torch.cuda._sleep(10_000_000)  # the ring must not be overwritten while this stream still reads it
        sums.append((received == batch(delivery.address.step, device)).all())
    assert len(sums) == 10
    assert bool(torch.stack(sums).all())


def test_gloo_edges_carry_cuda_tensors_between_ranks_on_one_gpu() -> None:
    run_ranks(exchange, 2, "gloo", start_method="spawn")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL refuses two ranks on one GPU")
def test_nccl_edges_carry_cuda_tensors_between_two_gpus() -> None:
    run_ranks(exchange, 2, "nccl", start_method="spawn")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_whole_job_runs_on_the_device(tmp_path: Path, ranks: int) -> None:
    result = distill("device=cuda", "run.dir=run", cwd=tmp_path, ranks=ranks)
    assert result.returncode == 0, result.stderr
    found = metrics(tmp_path / "run")
    assert found["environment"]["device"] != "cpu"
    assert all(block["rel_error_last"] < block["rel_error_first"] for block in found["blocks"])


def test_bf16_autocast_and_wire_run_on_the_device(tmp_path: Path) -> None:
    overrides = ("device=cuda", "distill.amp=bf16", "plan.wire_dtype=bf16", "stage=distill", "run.dir=run")
    result = distill(*overrides, cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr


def test_refining_and_fine_tuning_in_bf16_run_on_the_device(tmp_path: Path) -> None:
    learnt = ("finetune.amp=bf16", "finetune.views=1", "finetune.epochs=2", "finetune.sparsity=0.5", "activation=lma")
    result = distill("device=cuda", "run.dir=run", *FINISHED, *learnt, cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    found = metrics(tmp_path / "run")
    assert found["finetune"]["computed_in"].startswith("bf16")
    courses = [*found["refine"]["courses"].values(), found["finetune"]["epochs"]]
    assert all(epoch["loss"] is not None for course in courses for epoch in course)
    assert found["student"]["nonzero_params"] < 0.6 * found["student"]["params"]
