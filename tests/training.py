"""What the tests of one block's training share: a small block, batches by step, and looks with an error asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.cuda.lanes import Lane
from distill.planning.unit import Unit
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer, Reading

CPU = torch.device("cpu")


class NotedLane(Lane):
    """A lane that says whether what runs now runs on it."""

    inside = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


def module(*, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    return block.to(memory_format=torch.channels_last) if channels_last else block


def trainer(budget: int = 12, *, channels_last: bool = False, block: int = 0, **options: Any) -> BlockTrainer:
    return BlockTrainer(
        Unit.of_block(block, "layer"),
        module(channels_last=channels_last),
        budget=budget,
        device=CPU,
        options=TrainerOptions(**options),
    )


def batch(step: int, *, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, a pure function of it."""
    inputs = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    if channels_last:
        inputs = inputs.to(memory_format=torch.channels_last)
    return inputs, torch.tanh(inputs).roll(1, dims=1)


def train(one: BlockTrainer, stop: int, *, channels_last: bool = False) -> list[Reading]:
    """Train up to step `stop`; return what was read."""
    readings = [one.update(*batch(step, channels_last=channels_last)) for step in range(one.step, stop)]
    return [reading for reading in readings if reading is not None]


def weights(one: BlockTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.module.state_dict().items()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def look(one: BlockTrainer, error: float) -> None:
    """A look of one batch whose relative error is `error`: the targets are the outputs and a controlled difference."""
    inputs, _ = batch(1000)
    one.module.eval()
    with torch.no_grad():
        outputs = one.module(inputs)
    one.module.train()
    difference = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5))
    # |difference|^2 / var(outputs + difference) grows from 0 with the scale: bisect for the error asked for.
    low, high = 0.0, 1e3
    for _ in range(60):
        scale = (low + high) / 2
        found = float((scale * difference).square().mean() / (outputs + scale * difference).var(correction=0))
        low, high = (scale, high) if found < error else (low, scale)
    one.look(inputs, outputs + low * difference, last=True)
