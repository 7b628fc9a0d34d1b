"""One step of the distill stage in one process (batch, teacher, an update of every student) against a plain eager loop.

    python benchmarks/step.py [--rounds 7] [--steps 3] [--threads 1 2] [--device cuda]

ResNet-20 by residual block, separable students, batch 128, all nine blocks; random weights and embedded images at
32 x 32 pixels, since a step costs the same for any. The plain loop is what a good PyTorch user writes first: the same
networks, students and loss in float32 and contiguous (NCHW) memory; images resident as float32 on the device and
normalised batch by batch, with the same random crop for a whole batch; the frozen teacher block by block under no_grad
once per batch; one torch.optim.Adam with its defaults over all students; losses read every 20 steps. Ours is what the
job runs: its data set, RelayStream and BlockTrainer. All set-ups alternate within every round; a ratio is taken
within a round, medians are over rounds. CPU seconds are there too: they stand a busy machine better than wall time.
"""

from __future__ import annotations

import argparse
import copy
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import summary, write
from torch import Tensor, nn

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.cut import Chain, Granularity, cut
from distill.cuda.graphs import cuda_capture
from distill.cuda.lanes import Lane, lanes
from distill.data import Augment, DataOptions, Dataset, open_dataset
from distill.engine.streams.relay import OwnBatches, RelayStream
from distill.observability.trace import Trace
from distill.planning.costs import Span
from distill.planning.schedule import Checks, Feed
from distill.planning.unit import Unit
from distill.recipes import Separable, replace_convolutions
from distill.teachers import build_architecture
from distill.training.graphed_teacher import GraphedChain
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer

NETWORK = "cifar_resnet20"
IMAGE_SIZE = 32
BUDGET = 1_000_000  # never reached
LR = 3e-3
SETUPS = {  # name: precision of the teacher and of the students; the baseline comes first
    "plain": None,
    "fp32": ("off", "off"),
    "bf16 students": ("off", "bf16"),
    "bf16": ("bf16", "bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of every set-up in a round")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    device = torch.device(args.device)
    found = {}
    with _open(args.batch_size, device) as dataset:
        for threads in args.threads if device.type == "cpu" else args.threads[:1]:
            torch.set_num_threads(threads)
            found[f"{threads} threads"] = _compare(dataset, device, args)
    what = f"{NETWORK} by residual block, one step of all students, batch {args.batch_size}"
    on = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    write(f"step_{device.type}", {"what": what, "device": on, "plain_loop": __doc__, **found})


def _open(batch_size: int, device: torch.device) -> Dataset:
    options = DataOptions(
        name="digits",
        image_size=IMAGE_SIZE,
        augment=Augment.crop_flip,
        batch_size=batch_size,
        validation_fraction=0.05,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    return open_dataset(options, seed=0, device=device)


def _compare(dataset: Dataset, device: torch.device, args: argparse.Namespace) -> dict[str, object]:
    steps = {name: _setup(name, dataset, device) for name in SETUPS}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        _seconds(step, 6 if device.type == "cuda" else 2, device)  # warm
    for _ in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(_seconds(step, args.steps, device))
    result: dict[str, object] = {}
    for clock, name in enumerate(("seconds", "cpu_seconds")):
        values = {setup: [pair[clock] for pair in pairs] for setup, pairs in seconds.items()}
        result[f"{name}_per_step"] = {setup: summary(found) for setup, found in values.items()}
        result[f"times_fewer_{name}_than_plain"] = {
            setup: summary([plain / ours for plain, ours in zip(values["plain"], found, strict=True)])
            for setup, found in values.items()
            if setup != "plain"
        }
    return result


def _seconds(step: Callable[[], None], steps: int, device: torch.device) -> tuple[float, float]:
    """Return wall and CPU seconds of a step."""
    start = _now(device)
    for _ in range(steps):
        step()
    end = _now(device)
    return (end[0] - start[0]) / steps, (end[1] - start[1]) / steps


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _setup(name: str, dataset: Dataset, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    network = build_architecture(source="cifar", name=NETWORK, num_classes=10).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    chain = cut(network, dataset.train_batch(0).images, granularity=Granularity.residual)
    precision = SETUPS[name]
    if precision is None:
        return _plain(network, chain, dataset)
    teacher_amp, amp = precision
    students = students_of(network, chain)
    return _ours(Bf16Chain(chain) if teacher_amp == "bf16" else chain, students, dataset, device, amp)


def students_of(network: nn.Module, chain: Chain) -> dict[int, nn.Module]:
    """Return a separable student of every block with a convolution to replace, as the job makes them."""
    recipe = Separable(rank=2, init="teacher")
    students = {}
    for block in chain.blocks:
        paths = [
            path
            for path in block.convolutions
            if recipe.fits(network.get_submodule(path)) and path != chain.first_convolution
        ]
        if paths:
            students[block.index] = chain.block_module(block.index)
            replace_convolutions(students[block.index], paths, recipe, torch.Generator().manual_seed(block.index))
    return students


def _ours(
    chain: Chain, students: dict[int, nn.Module], dataset: Dataset, device: torch.device, amp: str
) -> Callable[[], None]:
    options = TrainerOptions(lr=LR, amp=amp)
    on_cuda = device.type == "cuda"
    sides = lanes(device) if on_cuda else [Lane()]
    chain = GraphedChain(chain, cuda_capture(Lane(device))) if on_cuda else chain
    trainers = {
        block: BlockTrainer(
            Unit.of_block(block, chain.blocks[block].name),
            student.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            budget=BUDGET,
            device=device,
            options=options,
            lane=sides[block % len(sides)],
        )
        for block, student in students.items()
    }
    feed = Feed(0, [Span(block, 0, BUDGET) for block in trainers], Checks())
    stream = RelayStream(
        chain=chain,
        origin=OwnBatches(dataset, budget=BUDGET, own=feed),
        first=0,
        own=feed,
        after=None,
        finished_elsewhere=list,
        rounded_to=chain.boundaries[0].dtype,
        wake=threading.Event(),
        timeout_s=60.0,
        trace=Trace(),
    )
    deliveries = iter(stream)

    def step() -> None:
        boundaries = next(deliveries).boundaries
        for block, trainer in trainers.items():
            with trainer.lane.entered():
                trainer.update(boundaries[block], boundaries[block + 1])

    return step


def _plain(network: nn.Module, chain: Chain, dataset: Dataset) -> Callable[[], None]:
    students = students_of(network, chain)
    for student in students.values():
        student.to(memory_format=torch.contiguous_format)
    last = max(students) + 1
    teacher = nn.ModuleList(copy.deepcopy(chain._modules[k]) for k in range(last))  # type: ignore[attr-defined]
    teacher.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    optimizer = torch.optim.Adam([p for student in students.values() for p in student.parameters()], lr=LR)
    images = torch.cat([batch.images for batch in dataset.train_batches(0, dataset.steps_per_epoch)]).contiguous()
    images = images * 0.5 + 0.5
    losses: list[Tensor] = []
    size = dataset.batch_size

    def step() -> None:
        chosen = images[torch.randint(len(images), (size,), device=images.device)]
        x = _crop((chosen - 0.5) / 0.5)
        with torch.no_grad():
            activations = [x]
            for block in teacher:
                activations.append(block(activations[-1]))
        optimizer.zero_grad()
        for k, student in students.items():
            target = activations[k + 1]
            loss = F.mse_loss(student(activations[k]), target) / target.var(correction=0)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        if len(losses) >= 20 * len(students):
            torch.stack(losses).tolist()
            losses.clear()

    return step


def _crop(x: Tensor) -> Tensor:
    top, left = torch.randint(9, (2,)).tolist()
    x = F.pad(x, (4, 4, 4, 4))[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    return x.flip(3) if torch.rand(()) < 0.5 else x


if __name__ == "__main__":
    main()
