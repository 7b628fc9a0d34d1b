"""Operations and bytes per second of every block's step beside what the device can do, and of the whole step.

    python benchmarks/ceilings.py --device cuda [--networks resnet50 vgg16_bn] [--batch-size 128] [--image-size 224]
    python benchmarks/ceilings.py --networks resnet50 --batch-size 2 --image-size 64 --seconds 0.2     # tried on a CPU

The ceilings are measured: FLOP/s of a large square matrix product in the step's precision, bytes/s of a large copy
(read and written). Operations and bytes are those of every kernel that an uncaptured step launches, its operands read
once and its results written once (distill/counting.py): what an execution without fusion has to move. A block's
floor is the longer of its operations and its bytes at the ceilings; its share is floor over measured time. Teacher
blocks and updates are timed one by one; the whole step runs the way the job runs it. Random weights and images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from measure import summary, write
from step import BUDGET, students_of
from torch import Tensor

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.cut import Chain, Granularity, cut
from distill.cuda.graphs import WARM_UPS, cuda_capture
from distill.cuda.lanes import Lane, lanes
from distill.planning.unit import Unit
from distill.simulation.operations import Recorder
from distill.teachers import build_architecture
from distill.training.graphed_teacher import GraphedChain
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer

NETWORKS = {"resnet50": Granularity.residual, "vgg16_bn": Granularity.conv}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--amp", default="bf16", choices=["off", "bf16"], help="precision of teacher and students")
    parser.add_argument("--seconds", type=float, default=1.0, help="of repetitions for every time measured")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float32
    ceilings = {"flops_per_s": _matmul(device, dtype, args.seconds), "bytes_per_s": _copy(device, args.seconds)}
    networks = {name: _network(name, device, ceilings, args) for name in args.networks}
    on = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    what = f"one step, batch {args.batch_size}, {args.image_size} pixels, amp {args.amp}, teacher and students"
    write(f"ceilings_{device.type}", {"what": what, "device": on, "ceilings": ceilings, "networks": networks})


def _matmul(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(_times(lambda: torch.mm(a, b), device, seconds))


def _copy(device: torch.device, seconds: float) -> float:
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / min(_times(lambda: target.copy_(source), device, seconds))


def _times(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Return the seconds of repeated calls, warm."""
    for _ in range(WARM_UPS + 2 if device.type == "cuda" else 1):  # past the capture of a graph
        call()
    found: list[float] = []
    while len(found) < 3 or sum(found) < seconds:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count(call: Callable[[], object], found: dict[str, float]) -> None:
    """Add the operations and bytes of a call's kernels to found["flops"] and found["bytes"]."""
    with Recorder() as recorder:
        call()
    found["flops"] = found.get("flops", 0) + sum(operation.flops for operation in recorder.operations)
    found["bytes"] = found.get("bytes", 0) + sum(operation.moved_bytes for operation in recorder.operations)


def _network(name: str, device: torch.device, ceilings: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    network = build_architecture(source="torchvision", name=name, num_classes=1000).to(device)
    network.to(memory_format=torch.channels_last)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    plain = cut(network, images, granularity=NETWORKS[name])
    chain: Chain = Bf16Chain(plain) if args.amp == "bf16" else plain
    on_cuda = device.type == "cuda"
    sides = lanes(device) if on_cuda else [Lane()]
    options = TrainerOptions(amp=args.amp)
    trainers = {
        block: BlockTrainer(
            Unit.of_block(block, chain.blocks[block].name),
            student.to(device, memory_format=torch.channels_last),
            budget=BUDGET,
            device=device,
            options=options,
            lane=sides[block % len(sides)],
        )
        for block, student in students_of(network, plain).items()
    }
    blocks = [
        _block(chain, trainers.get(index), images if index == 0 else None, ceilings, args, index=index)
        for index in range(max(trainers) + 1)
    ]
    teacher = GraphedChain(chain, cuda_capture(Lane(device))) if on_cuda else chain
    keep = set(trainers) | {block + 1 for block in trainers}

    def step() -> None:
        boundaries = teacher.run(images, last=max(keep), keep=keep)
        for block, trainer in trainers.items():
            with trainer.lane.entered():
                trainer.update(boundaries[block], boundaries[block + 1])

    whole = summary(_times(step, device, 3 * args.seconds))
    floor = sum(block["floor_s"] for block in blocks)
    return {
        "blocks": blocks,
        "seconds_per_step": whole,
        "floor_s": floor,
        "share_of_the_binding_ceiling": floor / whole["median"],
        "flops_per_s": sum(block["flops"] for block in blocks) / whole["median"],
        "bytes_per_s": sum(block["bytes"] for block in blocks) / whole["median"],
    }


def _block(
    chain: Chain,
    trainer: BlockTrainer | None,
    images: Tensor | None,
    ceilings: dict[str, float],
    args: argparse.Namespace,
    *,
    index: int,
) -> dict[str, Any]:
    """Count and time one block of the teacher and one update of its student."""
    device = torch.device(args.device)
    form = chain.boundaries[index]
    x = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=device).normal_()
    x = x if images is None else images
    found: dict[str, float] = {}
    target = chain.run_block(index, x)
    _count(lambda: chain.run_block(index, x), found)
    teacher = GraphedChain(chain, cuda_capture(Lane(device))) if device.type == "cuda" else chain
    seconds = summary(
        _times(lambda: teacher.run(x, first=index, last=index + 1, keep=(index + 1,)), device, args.seconds)
    )["median"]
    if trainer is not None:
        plain = BlockTrainer(
            trainer.unit, deepcopy(trainer.module), budget=BUDGET, device=device, options=TrainerOptions(amp=args.amp)
        )
        plain.update(x, target)  # the first step makes the optimizer's state
        _count(lambda: plain.update(x, target), found)
        with trainer.lane.entered():
            seconds += summary(_times(lambda: trainer.update(x, target), device, args.seconds))["median"]
    floors = {"flops": found["flops"] / ceilings["flops_per_s"], "bytes": found["bytes"] / ceilings["bytes_per_s"]}
    binding = max(floors, key=floors.__getitem__)
    return {
        "block": chain.blocks[index].name,
        "seconds": seconds,
        **found,
        "flops_per_s": found["flops"] / seconds,
        "bytes_per_s": found["bytes"] / seconds,
        "binding": binding,
        "floor_s": floors[binding],
        "share": floors[binding] / seconds,
    }


if __name__ == "__main__":
    main()
