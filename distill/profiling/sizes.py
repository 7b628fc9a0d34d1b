"""What a block holds and what one image costs in it when the network is used: the teacher's and its student's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.profiling.block_costs import MakeTrainer, count_flops, flop_costs


@dataclass(frozen=True)
class Sizes:
    """Of one side, per block; None where it has no such block, or where what lies between listed modules is not one."""

    params: tuple[int | None, ...]
    flops: tuple[float | None, ...]


def block_sizes(chain: Chain, make_trainer: MakeTrainer, sample: Tensor) -> tuple[Sizes, Sizes]:
    """Return the sizes of the teacher's blocks and of the students': parameters, and the FLOPs (two per multiply-add)
    that one image like those of `sample` costs in use, without training."""
    teacher_flops = flop_costs(chain, lambda _: None, sample).teacher
    student_params: list[int | None] = []
    student_flops: list[float | None] = []
    inputs = sample[:2]
    for index, (_, targets) in enumerate(chain.counted(inputs, lambda: 0.0)):
        trainer = make_trainer(index)
        student_params.append(_params(trainer.module) if trainer else None)
        student_flops.append(_flops(trainer.module, inputs) if trainer else None)
        inputs = targets
    teacher = Sizes(
        tuple(_teacher_params(chain, index) for index in range(len(chain.blocks))),
        tuple(flops / len(sample) for flops in teacher_flops),
    )
    return teacher, Sizes(tuple(student_params), tuple(student_flops))


def _teacher_params(chain: Chain, index: int) -> int | None:
    try:
        return _params(chain.block_module(index))
    except NotImplementedError:  # what lies between two listed modules is part of the network's own code
        return None


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(module: nn.Module, inputs: Tensor) -> float:
    """FLOPs of one image."""
    module.eval()
    with torch.no_grad():
        return count_flops(lambda: module(inputs.float())) / len(inputs)  # a teacher in bf16 gives bf16
