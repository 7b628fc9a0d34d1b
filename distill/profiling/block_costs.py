"""What a block costs: FLOPs counted, seconds measured on this machine, bytes of its boundaries.

FLOPs are two per multiply-add (flops.py).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from operator import add

import torch
from torch import Tensor

from distill.blocks.chain import Chain
from distill.cuda.graphs import WARM_UPS
from distill.profiling.flops import flop_counter
from distill.training.trainer import BlockTrainer

REPEAT_S = 0.4  # timing one call stops after this long, but not before three repetitions
LONG_S = 2.0  # or fewer that took this long together: 64 images of 224 pixels take a ResNet50 10 s on a CPU core
BUDGET_S = 4.0  # measuring all blocks stops after this long, but not before MIN_ROUNDS rounds,
LONGEST_S = 12.0  # or after up to this long where that is
_TINY_S = 1e-6
WORTH = 0.02  # of the seconds of all steps one after another, which a better plan may save
MIN_ROUNDS = 3
SPELL_S, SPELLS = 0.03, 3  # on a GPU calls are timed in spells of this length, which are waited for at their end alone
SAME = 0.1  # ranks whose speeds differ by less are planned as equals

MakeTrainer = Callable[[int], BlockTrainer | None]  # a fresh scratch trainer of a block, None where it has no student


@dataclass(frozen=True)
class BlockCosts:
    """Per block, for one batch: forward of the teacher, one step of the student (0 where a block has none)."""

    teacher: tuple[float, ...]
    student: tuple[float, ...]

    @property
    def total(self) -> float:
        """Of all blocks together."""
        return sum(self.teacher + self.student)

    def blocks_within(self, share: float) -> int:
        """Return how many of the first blocks cost no more than a share of all."""
        up_to = accumulate(map(add, self.teacher, self.student))
        return sum(cost <= share * self.total for cost in up_to)


def count_flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of a call, forward and backward, two per multiply-add."""
    with flop_counter() as counter:
        call()
    return int(counter.get_total_flops())


def measure_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call after one warm-up call, waiting for the device."""
    call()
    times = [_seconds(call, device)]
    while sum(times) < (LONG_S if len(times) < 3 else REPEAT_S):
        times.append(_seconds(call, device))
    return statistics.median(times)


def flop_costs(chain: Chain, make_trainer: MakeTrainer, sample: Tensor) -> BlockCosts:
    """Return FLOPs per block for a batch like `sample` (batch, channels, height, width); two images are counted."""
    scale = len(sample) / 2
    with flop_counter() as counter:
        costs = _per_block(chain, make_trainer, sample[:2], counter.get_total_flops)
    return BlockCosts(tuple(scale * flops for flops in costs.teacher), tuple(scale * flops for flops in costs.student))


def measured_costs(
    chain: Chain, make_trainer: MakeTrainer, sample: Tensor, *, steps: int, ahead: float = 0.0
) -> BlockCosts:
    """Return seconds per block at the sample's batch size: in the proportions of medians, which placement needs, and
    with the sum of means, which is what many steps take. Takes longer for many `steps` of every block.

    Every round goes once through all blocks, as training does: caches are as cold as they will be, and a slow moment of
    the machine falls on all blocks alike. The first round warms up. Then comes the share `ahead` of a round: ranks of
    one host that measure at the same time are to be at different blocks, as they will be, since those that are bound by
    memory slow one another down more than others.
    """
    trainers = [make_trainer(index) for index in range(len(chain.blocks))]
    now = partial(_now, sample.device)
    rounds: list[BlockCosts] = []
    started = time.perf_counter()
    budget_s = BUDGET_S
    while len(rounds) <= MIN_ROUNDS or time.perf_counter() - started < budget_s:
        rounds.append(_per_block(chain, trainers.__getitem__, sample, now))
        budget_s = max(BUDGET_S, min(LONGEST_S, WORTH * steps * rounds[-1].total))
        if len(rounds) == 1:
            first_blocks = _block_by_block(chain, trainers.__getitem__, sample, now)
            deque(islice(first_blocks, rounds[0].blocks_within(ahead)), maxlen=0)
    warm = rounds[1:]
    teacher = [statistics.median(values) for values in zip(*(r.teacher for r in warm), strict=True)]
    student = [statistics.median(values) for values in zip(*(r.student for r in warm), strict=True)]
    scale = statistics.fmean(r.total for r in warm) / sum(teacher + student)
    return BlockCosts(tuple(scale * seconds for seconds in teacher), tuple(scale * seconds for seconds in student))


def sustained_costs(chain: Chain, make_trainer: MakeTrainer, images: Callable[[], Tensor]) -> BlockCosts:
    """Return seconds per block on a GPU, as training runs it: from captured graphs, one batch after another without
    waiting for the device, `images` making each batch there. Blocks in the proportions of what each takes alone; the
    sum is that of whole steps, in which batches, teacher and students overlap.
    """
    last = len(chain.blocks)
    trainers = {index: trainer for index in range(last) if (trainer := make_trainer(index))}

    def teach() -> dict[int, Tensor]:
        return chain.run(images(), last=last, keep=range(last + 1))

    def learn(blocks: Iterable[int]) -> None:
        for index in blocks:
            with trainers[index].lane.entered():
                trainers[index].update(batch[index], batch[index + 1])

    def step() -> None:
        batch.update(teach())
        learn(trainers)

    batch = teach()
    time_of = partial(_sustained, device=batch[0].device)
    teacher = _teacher_seconds(chain, batch, time_of)
    student = [time_of(partial(learn, [index])) if index in trainers else 0.0 for index in range(last)]
    apart = time_of(teach), time_of(partial(learn, trainers)) if trainers else 0.0
    overlap = time_of(step) / sum(apart)
    return BlockCosts(_with_sum(overlap * apart[0], teacher), _with_sum(overlap * apart[1], student))


def _with_sum(total: float, parts: Sequence[float]) -> tuple[float, ...]:
    return tuple(total * part / max(sum(parts), _TINY_S) for part in parts)


def _teacher_seconds(
    chain: Chain, batch: Mapping[int, Tensor], time_of: Callable[[Callable[[], object]], float]
) -> list[float]:
    if chain.divisible:
        return [
            time_of(partial(chain.run, batch[index], first=index, last=index + 1, keep=(index + 1,)))
            for index in range(len(chain.blocks))
        ]
    return [seconds for seconds, _ in chain.counted(batch[0], partial(_now, batch[0].device))]


def _sustained(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one of many calls that nobody waits for, the median of several spells."""
    for _ in range(WARM_UPS + 2):  # until it is captured, and once more
        call()
    number = max(1, int(SPELL_S / max(_seconds(call, device), _TINY_S)))
    spells = [_seconds(partial(_repeat, call, number), device) / number for _ in range(SPELLS)]
    return statistics.median(spells)


def _repeat(call: Callable[[], object], number: int) -> None:
    for _ in range(number):
        call()


def step_bytes(chain: Chain, make_trainer: MakeTrainer, sample: Tensor) -> tuple[int, ...]:
    """Return by block the bytes that are alive during one step of its student on a batch like `sample`, besides its
    weights and boundaries: what autograd keeps for the backward pass, and two activations of the largest size on the
    way back. Two images are looked at; 0 where a block has no student."""
    found, scale = [], len(sample) / 2
    inputs = sample[:2]
    for index, (_, targets) in enumerate(chain.counted(inputs, lambda: 0.0)):
        trainer = make_trainer(index)
        found.append(int(scale * _kept_bytes(trainer, inputs, targets)) if trainer else 0)
        inputs = targets
    return tuple(found)


def _kept_bytes(trainer: BlockTrainer, inputs: Tensor, targets: Tensor) -> int:
    known = {one.untyped_storage().data_ptr() for one in (*trainer.module.parameters(), inputs, targets)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with trainer.lane.entered(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.update(inputs, targets)
    return sum(kept.values()) + 2 * max(kept.values(), default=0)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = _now(device)
    call()
    return _now(device) - start


def _now(device: torch.device) -> float:
    """Return a clock's seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def _per_block(chain: Chain, make_trainer: MakeTrainer, sample: Tensor, counter: Callable[[], float]) -> BlockCosts:
    """Return by how much `counter` rises in the teacher's forward of every block and in one step of its student."""
    teacher, student = zip(*_block_by_block(chain, make_trainer, sample, counter), strict=True)
    return BlockCosts(teacher, student)


def _block_by_block(
    chain: Chain, make_trainer: MakeTrainer, sample: Tensor, counter: Callable[[], float]
) -> Iterator[tuple[float, float]]:
    inputs = sample
    for index, (rise, targets) in enumerate(chain.counted(sample, counter)):
        trainer = make_trainer(index)
        before = counter()
        if trainer:
            with trainer.lane.entered():
                trainer.update(inputs, targets)
        yield rise, counter() - before if trainer else 0.0
        inputs = targets
