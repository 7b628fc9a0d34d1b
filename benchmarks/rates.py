"""Learning rates of blocks against their first weights: held-out relative error before and after 10, 50 and 200 steps.

    python benchmarks/rates.py --data CIFAR10_FOLDER/test.parquet --teacher resnet20-12fca82f.th [--resnet50]

ResNet-20 on CIFAR-10 at batch 64; with --resnet50 torchvision's ResNet-50 instead, at 224 pixels and batch 8, its
weights random and its batch norms' statistics taken over three batches, since untrained ones (mean 0, variance 1) are
so far from what flows that they move the error more than any step. Separable students of rank 2, by residual block;
BlockTrainer trains them. First weights:

data     least error of the convolution's output on its inputs: student.init=data
kernel   least error of the kernel: student.init=teacher
random   student.init=random

All rates and starts of a budget see the same batches. Held out: four batches, after the batch norms' statistics are
taken anew over six training batches, as they are in a delivered student; so a start is judged like an end.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
import torchvision
from measure import write
from torch import Tensor, nn

from distill.blocks.cut import Chain, Granularity, cut
from distill.data import Augment, DataOptions, Dataset, open_dataset
from distill.planning.unit import Unit
from distill.profiling.statistics import gather
from distill.recipes.replacement import replace_convolutions
from distill.recipes.separable import Separable
from distill.teachers import build_architecture, load_weights
from distill.training.losses import relative_error
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer

CPU = torch.device("cpu")
RATES = {"3e-3": 3e-3, "1e-3": 1e-3, "3e-4": 3e-4, "from the start": None}
BLOCKS = {"resnet20": ("layer1.0", "layer3.1"), "resnet50": ("layer1.0", "layer1.1")}
STARTS = {"resnet20": ("data", "kernel", "random"), "resnet50": ("data",)}
RANK, HELD_OUT, RE_ESTIMATED, STATISTICS = 2, 4, 6, 4  # the latter three in batches
APART = 100_000  # steps of training batches that nobody trains on

Boundaries = list[Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--resnet50", action="store_true")
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = "resnet50" if args.resnet50 else "resnet20"
    with _open(args.data, size=224 if args.resnet50 else 32, batch_size=8 if args.resnet50 else 64) as dataset:
        network = _resnet50(dataset) if args.resnet50 else _resnet20(args.teacher)
        bench = Bench(network, dataset, BLOCKS[name])
        rows = [row for budget in args.budgets for row in bench.rows(budget, STARTS[name], args.rates)]
    print(_table(rows, args.rates))
    what = f"{name}, separable r={RANK}, {dataset.batch_size} images a batch: held-out relative error by steps and rate"
    write(f"rates_{name}", {"what": what, "rows": rows})


def _open(path: Path, *, size: int, batch_size: int) -> Dataset:
    options = DataOptions(
        name="hf",
        root=str(path.absolute()),
        image_size=size,
        augment=Augment.crop_flip,
        batch_size=batch_size,
        validation_fraction=0.1,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    )
    return open_dataset(options, seed=0, device=CPU)


def _resnet20(weights: Path) -> nn.Module:
    network = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    load_weights(network, str(weights))
    return network


@torch.no_grad()
def _resnet50(dataset: Dataset) -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None).to(memory_format=torch.channels_last)
    _take_statistics(network, [dataset.train_batch(APART + k).images for k in range(3)])
    return network


class Bench:
    """The cut teacher, what flows at the boundaries of the blocks measured, and statistics for their first weights."""

    def __init__(self, network: nn.Module, dataset: Dataset, blocks: Sequence[str]) -> None:
        self._network, self._dataset = network.to(memory_format=torch.channels_last), dataset  # type: ignore[call-overload]
        self._chain: Chain = cut(network, dataset.train_batch(0).images, granularity=Granularity.residual)
        self._blocks = [block.index for block in self._chain.blocks if block.name in blocks]
        self._teacher = [self._chain.block_module(index).eval() for index in range(max(self._blocks) + 1)]
        self._held_out = [self._run(dataset.validation_batch(k).images) for k in range(HELD_OUT)]
        self._others = [self._run(dataset.train_batch(APART + k).images) for k in range(RE_ESTIMATED)]
        layers = {path: network.get_submodule(path) for index in self._blocks for path in self._replaced(index)}
        images = [dataset.train_batch(APART + RE_ESTIMATED + k).images[:16] for k in range(STATISTICS)]
        norms = {path: norm for path, norm in network.named_modules() if isinstance(norm, nn.BatchNorm2d)}
        self._statistics = gather(layers, images, network.eval(), norms)

    def rows(self, budget: int, starts: Sequence[str], rates: Sequence[str]) -> Iterator[dict[str, object]]:
        """Train one student of every block, start and rate for `budget` steps; yield what they started and ended at."""
        setups = list(product(self._blocks, starts))
        students = {setup: self._student(*setup) for setup in setups}
        trainers = {
            (setup, rate): self._trainer(setup[0], students[setup], budget, rate) for setup in setups for rate in rates
        }
        for step in range(budget):
            boundaries = self._run(self._dataset.train_batch(step).images)
            for ((block, _), _), trainer in trainers.items():
                trainer.update(boundaries[block], boundaries[block + 1])
        for block, start in setups:
            errors = {rate: self._error(trainers[(block, start), rate].module, block) for rate in rates}
            row = {"block": self._chain.blocks[block].name, "first_weights": start, "steps": budget}
            yield row | {"at_the_start": self._error(students[block, start], block), "at_the_end": errors}

    @torch.no_grad()
    def _run(self, images: Tensor) -> Boundaries:
        boundaries = [images]
        for block in self._teacher:
            boundaries.append(block(boundaries[-1]))
        return boundaries

    def _replaced(self, index: int) -> list[str]:
        paths = self._chain.blocks[index].convolutions
        return [path for path in paths if self._network.get_submodule(path).kernel_size == (3, 3)]

    def _student(self, block: int, start: str) -> nn.Module:
        student = self._chain.block_module(block)
        recipe = Separable(rank=RANK, init="teacher" if start == "kernel" else start)
        statistics = self._statistics if start == "data" else None
        replace_convolutions(student, self._replaced(block), recipe, torch.Generator().manual_seed(block), statistics)
        return student.requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _trainer(self, block: int, student: nn.Module, budget: int, rate: str) -> BlockTrainer:
        unit, options = Unit.of_block(block, self._chain.blocks[block].name), TrainerOptions(lr=RATES[rate])
        return BlockTrainer(unit, copy.deepcopy(student), budget=budget, device=CPU, options=options)

    @torch.no_grad()
    def _error(self, student: nn.Module, block: int) -> float:
        student = copy.deepcopy(student)
        _take_statistics(student, [boundaries[block] for boundaries in self._others])
        errors = [relative_error(student(b[block]), b[block + 1]) for b in self._held_out]
        return float(torch.stack(errors).mean())


def _take_statistics(module: nn.Module, batches: Sequence[Tensor]) -> None:
    """Make the running statistics of batch norms the means over these batches; leaves the module in eval mode."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    module.train()
    for batch in batches:
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()


def _table(rows: Sequence[dict], rates: Sequence[str]) -> str:
    """Return the rows as a table for docs/results.md."""
    lines = [
        "| block | first weights | steps | at the start | " + " | ".join(rates) + " |",
        "| --- " * (4 + len(rates)) + "|",
    ]
    for row in rows:
        cells = [row["block"], row["first_weights"], str(row["steps"]), f"{row['at_the_start']:.4f}"]
        lines.append("| " + " | ".join([*cells, *(f"{row['at_the_end'][rate]:.4f}" for rate in rates)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
