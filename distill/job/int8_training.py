"""Quantisation-aware training, block by block: the blocks of a student that lose most by INT8 learn to give in INT8
what they give in fp32. They are trained side by side off one pass of the fp32 student, which is their teacher here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain, made_trainable
from distill.data import Dataset
from distill.job.first_weights import IMAGES
from distill.planning.unit import Unit
from distill.storage.aliases import load_state
from distill.student.programs import contiguous_copy, quietly
from distill.training.fake_quantised import FakeQuantised
from distill.training.losses import relative_error
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer

WORST = 4  # blocks that are trained, at most: what INT8 takes comes from few
TRAIN_FROM = 3000  # the first training batch: none of those that ranges and fits are from
OPTIONS = TrainerOptions(lr=1e-4)  # little: weights are where they should be but for rounding


def trained_for_int8(chain: Chain, dataset: Dataset, *, steps: int) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Return the weights of the blocks that lose most by INT8, trained for it, by the student's names; and by block the
    relative errors of INT8 on held-out images before and after. Batch norms keep their statistics.

    `chain` is the student, cut, on the CPU. Raises what torch.export raises of blocks that it cannot read.
    """
    held_out = _passing(chain, dataset.validation_batch(0).images[:IMAGES].cpu(), range(len(chain.blocks)))
    with quietly():
        blocks = {block: _fake_quantised(chain, block, held_out[block]) for block in _weighted(chain)}
    before = {block: _error(module, block, held_out) for block, module in blocks.items()}
    worst = sorted(sorted(before, key=lambda block: -before[block])[:WORST])
    trainers = {block: _trainer(chain, block, blocks[block], steps) for block in worst}
    for step in range(steps):
        passing = _passing(chain, dataset.train_batch(TRAIN_FROM + step).images.cpu(), worst)
        for block, trainer in trainers.items():
            trainer.update(passing[block], passing[block + 1])
    weights: dict[str, Tensor] = {}
    for trainer in trainers.values():
        weights |= {name.removeprefix("program."): tensor for name, tensor in trainer.final().weights.items()}
    after = {block: _error(trainer.module, block, held_out) for block, trainer in trainers.items()}
    return weights, {chain.blocks[block].name: [before[block], after[block]] for block in worst}


def with_weights(student: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Return a copy of the student, on the CPU, with these weights in the place of its own."""
    network = contiguous_copy(student).eval()
    load_state(network, {**network.state_dict(), **weights})
    return network


def _passing(chain: Chain, images: Tensor, blocks: Iterable[int]) -> dict[int, Tensor]:
    """Return what passes the ends of these blocks, by boundary."""
    ends = {boundary for block in blocks for boundary in (block, block + 1)}
    return chain.run(images, last=max(ends), keep=ends)


def _weighted(chain: Chain) -> list[int]:
    """Return the blocks that can run alone and have something to quantise."""
    modules = {block.index: chain.block_module(block.index) for block in chain.blocks}
    return [index for index, one in modules.items() if any(weight.dim() > 1 for weight in one.parameters())]


def _fake_quantised(chain: Chain, block: int, inputs: Tensor) -> FakeQuantised:
    return FakeQuantised(chain.block_module(block), inputs[:2])


def _trainer(chain: Chain, block: int, module: nn.Module, steps: int) -> BlockTrainer:
    unit = Unit.of_block(block, chain.blocks[block].name)
    return BlockTrainer(unit, made_trainable(module), budget=steps, device=torch.device("cpu"), options=OPTIONS)


@torch.no_grad()
def _error(module: nn.Module, block: int, passing: dict[int, Tensor]) -> float:
    """Return the relative error of a block in INT8 against itself in fp32."""
    return float(relative_error(module(passing[block]), passing[block + 1]))
