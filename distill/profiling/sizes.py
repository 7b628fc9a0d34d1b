"""What a block holds and what one image costs in it when the network is used: the teacher's and the students'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.profiling.block_costs import Students, count_flops, flop_costs, with_boundaries
from distill.training.trainer import BlockTrainer


@dataclass(frozen=True)
class Sizes:
    """Of one side, by block or unit; None where there is none, or where what is between listed modules is none."""

    params: tuple[int | None, ...]
    flops: tuple[float | None, ...]


def block_sizes(chain: Chain, students: Students, sample: Tensor) -> tuple[Sizes, Sizes]:
    """Return the sizes of the teacher's blocks, and by number those of the units: parameters, and the FLOPs (two per
    multiply-add) that one image like those of `sample` costs in use, without training."""
    teacher_flops = flop_costs(chain, {}, sample).teacher
    found: dict[int, tuple[int, float]] = {}
    for _, _, ending in with_boundaries(chain, students, sample[:2], lambda: 0.0):
        for unit, inputs, _ in ending:
            trainer = students[unit]()
            found[unit.number] = _params(trainer.module), _flops(trainer, inputs)
    teacher = Sizes(
        tuple(_teacher_params(chain, index) for index in range(len(chain.blocks))),
        tuple(flops / len(sample) for flops in teacher_flops),
    )
    numbers = range(max([len(chain.blocks), *(number + 1 for number in found)]))
    by_number = [found.get(number, (None, None)) for number in numbers]
    return teacher, Sizes(tuple(params for params, _ in by_number), tuple(flops for _, flops in by_number))


def _teacher_params(chain: Chain, index: int) -> int | None:
    try:
        return _params(chain.block_module(index))
    except NotImplementedError:  # what lies between two listed modules is part of the network's own code
        return None


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(trainer: BlockTrainer, inputs: Tensor) -> float:
    """FLOPs of one image."""
    trainer.module.eval()
    with torch.no_grad():
        return count_flops(lambda: trainer.forward(inputs)) / len(inputs)
