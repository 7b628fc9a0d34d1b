"""What a block costs: FLOPs counted, seconds measured on this machine, bytes of its boundaries.

FLOPs are torch.utils.flop_counter's: two per multiply-add.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distill.blocks import Chain
from distill.trainer import BlockTrainer

REPEAT_S = 0.4  # timing one call stops after this long, but not before three repetitions
BUDGET_S = 4.0  # measuring all blocks stops after this long, but not before MIN_ROUNDS rounds
MIN_ROUNDS = 3
SAME = 0.1  # ranks whose speeds differ by less are planned as equals
# By how much sending slows rank 0 down, gloo over loopback with both cores training (ResNet-20, 2 cores, 2026-11-21):
# with 0.4 ns a byte rank 1 idled 4 to 19 % of the stage, with 1.2 ns rank 0 idled 10 to 14 %.
WIRE_S_PER_BYTE = 0.8e-9

MakeTrainer = Callable[[int], BlockTrainer | None]  # a fresh scratch trainer of a block, None where it has no student


@dataclass(frozen=True)
class BlockCosts:
    """Per block, for one batch: forward of the teacher, one step of the student (0 where a block has none)."""

    teacher: tuple[float, ...]
    student: tuple[float, ...]


def count_flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of a call, forward and backward, two per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def measure_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call after one warm-up call, waiting for the device."""
    call()
    times = [_seconds(call, device)]
    while len(times) < 3 or sum(times) < REPEAT_S:
        times.append(_seconds(call, device))
    return statistics.median(times)


def flop_costs(chain: Chain, make_trainer: MakeTrainer, sample: Tensor) -> BlockCosts:
    """Return FLOPs per block for a batch like `sample` (batch, channels, height, width); two images are counted."""
    scale = len(sample) / 2
    return _per_block(chain, make_trainer, sample[:2], lambda call: scale * count_flops(call))


def measured_costs(chain: Chain, make_trainer: MakeTrainer, sample: Tensor) -> BlockCosts:
    """Return median seconds per block at the sample's batch size.

    Every round goes once through all blocks, as training does: caches are as cold as they will be, and a slow moment of
    the machine falls on all blocks alike (placement needs their proportions). The first round warms up.
    """
    trainers = [make_trainer(index) for index in range(len(chain.blocks))]
    rounds: list[BlockCosts] = []
    started = time.perf_counter()
    while len(rounds) <= MIN_ROUNDS or time.perf_counter() - started < BUDGET_S:
        rounds.append(_per_block(chain, trainers.__getitem__, sample, partial(_seconds, device=sample.device)))
    warm = rounds[1:]
    return BlockCosts(
        teacher=tuple(statistics.median(values) for values in zip(*(r.teacher for r in warm), strict=True)),
        student=tuple(statistics.median(values) for values in zip(*(r.student for r in warm), strict=True)),
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def calibrated(flops: BlockCosts, chain: Chain, sample: Tensor) -> BlockCosts:
    """Return FLOPs turned into seconds by timing the teacher alone: one speed for everything, which is what counting
    FLOPs assumes."""
    last = len(chain.blocks)
    seconds = measure_seconds(lambda: chain.run(sample, last=last, keep=(last,)), sample.device)
    scale = seconds / max(1.0, sum(flops.teacher))
    return BlockCosts(tuple(f * scale for f in flops.teacher), tuple(f * scale for f in flops.student))


def slowness(costs: Sequence[BlockCosts]) -> tuple[float, ...]:
    """Return how much longer each rank takes than the mean, the median over blocks; differences up to SAME are taken
    for noise."""
    mean = average(costs)
    usual = mean.teacher + mean.student
    ratios = [
        statistics.median(own / one for own, one in zip(c.teacher + c.student, usual, strict=True) if one)
        for c in costs
    ]
    return tuple(ratio if abs(ratio - 1) > SAME else 1.0 for ratio in ratios)


def average(costs: Sequence[BlockCosts]) -> BlockCosts:
    """Return the mean of several ranks' costs, block by block."""
    return BlockCosts(
        teacher=tuple(statistics.fmean(values) for values in zip(*(c.teacher for c in costs), strict=True)),
        student=tuple(statistics.fmean(values) for values in zip(*(c.student for c in costs), strict=True)),
    )


def _per_block(
    chain: Chain, make_trainer: MakeTrainer, sample: Tensor, price: Callable[[Callable[[], object]], float]
) -> BlockCosts:
    teacher, student = [], []
    inputs = sample
    for index in range(len(chain.blocks)):
        price_of_teacher, targets = _teach(chain, index, sample, inputs, price)
        teacher.append(price_of_teacher)
        trainer = make_trainer(index)
        student.append(price(partial(trainer.update, inputs, targets)) if trainer else 0.0)
        inputs = targets
    return BlockCosts(tuple(teacher), tuple(student))


def _teach(
    chain: Chain, index: int, sample: Tensor, inputs: Tensor, price: Callable[[Callable[[], object]], float]
) -> tuple[float, Tensor]:
    """Return a teacher block's price and its output; in a network that is only hooked, where what lies between the
    listed modules cannot run alone, the difference that it makes to the whole."""
    try:
        targets = chain.run_block(index, inputs)
    except NotImplementedError:
        with_it = price(partial(chain.run, sample, last=index + 1, keep=()))
        without = price(partial(chain.run, sample, last=index, keep=())) if index else 0.0
        return max(0.0, with_it - without), chain.run(sample, last=index + 1, keep=(index + 1,))[index + 1]
    return price(partial(chain.run_block, index, inputs)), targets
