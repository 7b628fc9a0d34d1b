"""What a block costs: FLOPs counted, seconds measured on this machine, bytes of its boundaries.

FLOPs are two per multiply-add (flops.py).
"""

from __future__ import annotations

import statistics
import time
from collections import ChainMap, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from typing import TypeVar

import torch
from torch import Tensor

from distill.blocks.chain import Chain
from distill.cuda.graphs import WARM_UPS
from distill.planning.unit import Unit
from distill.profiling.flops import flop_counter
from distill.training.trainer import BlockTrainer

REPEAT_S = 0.4  # timing one call stops after this long, but not before three repetitions
LONG_S = 2.0  # or fewer that took this long together: 64 images of 224 pixels take a ResNet50 10 s on a CPU core
BUDGET_S = 1.5  # measuring all blocks stops after this long, but not before MIN_ROUNDS rounds,
LONGEST_S = 12.0  # or after up to this long where that is
_TINY_S = 1e-6
WORTH = 0.02  # of the seconds of all steps one after another, which a better plan may save
MIN_ROUNDS = 3
SPELL_S, SPELLS = 0.03, 3  # on a GPU calls are timed in spells of this length, which are waited for at their end alone
Number = TypeVar("Number", int, float)
SAME = 0.1  # ranks whose speeds differ by less are planned as equals

Students = Mapping[Unit, Callable[[], BlockTrainer]]  # of every unit what makes a fresh scratch trainer


@dataclass(frozen=True)
class BlockCosts:
    """For one batch: by block the forward of the teacher, by a unit's number one step of it (0 where none has it)."""

    teacher: tuple[float, ...]
    student: tuple[float, ...]

    @property
    def total(self) -> float:
        """Of all blocks together."""
        return sum(self.teacher + self.student)


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


def flop_costs(chain: Chain, students: Students, sample: Tensor) -> BlockCosts:
    """Return FLOPs per block for a batch like `sample` (batch, channels, height, width); two images are counted."""
    # Two images and not one: batch norms in training mode refuse a single value a channel.
    scale = len(sample) / 2
    with flop_counter() as counter:
        costs = _costs(chain, students, lambda unit: students[unit](), sample[:2], counter.get_total_flops)
    return BlockCosts(tuple(scale * flops for flops in costs.teacher), tuple(scale * flops for flops in costs.student))


def measured_costs(chain: Chain, students: Students, sample: Tensor, *, steps: int, ahead: float = 0.0) -> BlockCosts:
    """Return seconds per block at the sample's batch size: in the proportions of medians, which placement needs, and
    with the sum of means, which is what many steps take. Takes longer for many `steps` of every block.

    Every round goes once through all blocks, as training does: caches are as cold as they will be, and a slow moment of
    the machine falls on all blocks alike. The first round warms up. Then comes the share `ahead` of a round: ranks of
    one host that measure at the same time are to be at different blocks, as they will be, since those that are bound by
    memory slow one another down more than others.
    """
    trainers = {unit: make() for unit, make in students.items()}
    trainer_of = trainers.__getitem__
    now = partial(_now, sample.device)
    rounds: list[BlockCosts] = []
    started = time.perf_counter()
    budget_s = BUDGET_S
    while len(rounds) <= MIN_ROUNDS or time.perf_counter() - started < budget_s:
        rounds.append(_costs(chain, trainers, trainer_of, sample, now))
        budget_s = max(BUDGET_S, min(LONGEST_S, WORTH * steps * rounds[-1].total))
        if len(rounds) == 1:
            first_blocks = _block_by_block(chain, trainers, trainer_of, sample, now)
            deque(islice(first_blocks, _blocks_within(rounds[0], trainers, ahead)), maxlen=0)
    warm = rounds[1:]
    teacher = [statistics.median(values) for values in zip(*(r.teacher for r in warm), strict=True)]
    student = [statistics.median(values) for values in zip(*(r.student for r in warm), strict=True)]
    scale = statistics.fmean(r.total for r in warm) / sum(teacher + student)
    return BlockCosts(tuple(scale * seconds for seconds in teacher), tuple(scale * seconds for seconds in student))


def _blocks_within(costs: BlockCosts, units: Iterable[Unit], share: float) -> int:
    """Return how many of the first blocks cost no more than a share of all, each with the units that end with it."""
    by_block = list(costs.teacher)
    for unit in units:
        by_block[unit.target - 1] += costs.student[unit.number]
    return sum(cost <= share * costs.total for cost in accumulate(by_block))


def sustained_costs(chain: Chain, students: Students, images: Callable[[], Tensor]) -> BlockCosts:
    """Return seconds per block on a GPU, as training runs it: from captured graphs, one batch after another without
    waiting for the device, `images` making each batch there. Blocks in the proportions of what each takes alone; the
    sum is that of whole steps, in which batches, teacher and students overlap.
    """
    last = len(chain.blocks)
    trainers = {unit: make() for unit, make in students.items()}

    def teach() -> dict[int, Tensor]:
        return chain.run(images(), last=last, keep=range(last + 1))

    def learn(units: Iterable[Unit]) -> None:
        for unit in units:
            with trainers[unit].lane.entered():
                trainers[unit].update(batch[unit.input], batch[unit.target])

    def step() -> None:
        batch.update(teach())
        learn(trainers)

    batch = teach()
    time_of = partial(_sustained, device=batch[0].device)
    teacher = _teacher_seconds(chain, batch, time_of)
    student = _by_number(chain, {unit.number: time_of(partial(learn, [unit])) for unit in trainers})
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


def step_bytes(chain: Chain, students: Students, sample: Tensor) -> tuple[int, ...]:
    """Return by a unit's number the bytes that are alive during one step of it on a batch like `sample`, besides its
    weights and boundaries: what autograd keeps for the backward pass, and two activations of the largest size on the
    way back. Two images are looked at; 0 where no unit has the number."""
    found, scale = {}, len(sample) / 2
    for _, _, ending in with_boundaries(chain, students, sample[:2], lambda: 0.0):
        for unit, inputs, targets in ending:
            found[unit.number] = int(scale * _kept_bytes(students[unit](), inputs, targets))
    return _by_number(chain, found)


def _kept_bytes(trainer: BlockTrainer, inputs: Tensor, targets: Tensor) -> int:
    known = {one.untyped_storage().data_ptr() for one in (*trainer.module.parameters(), inputs, targets)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # By storage: autograd saves views, and the same tensor for several operations, which take no memory of their
        # own.
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
    """Return how much longer each rank takes than the mean, the median over blocks and units; differences up
    to SAME are taken for noise."""
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


def with_boundaries(
    chain: Chain, units: Collection[Unit], sample: Tensor, counter: Callable[[], float]
) -> Iterator[tuple[int, float, list[tuple[Unit, Tensor, Tensor]]]]:
    """Yield for every block in order its index, by how much `counter` rises while the teacher computes it, and the
    units that end with it, each with its two boundaries for the network's input `sample`. What no unit needs any more
    is let go."""
    kept = {0: sample}
    for index, (rise, targets) in enumerate(chain.counted(sample, counter)):
        end = index + 1
        kept[end] = targets
        yield index, rise, [(unit, kept[unit.input], targets) for unit in units if unit.target == end]
        kept = {k: x for k, x in kept.items() if any(unit.input == k and unit.target > end for unit in units)}


def _costs(
    chain: Chain,
    units: Collection[Unit],
    trainer_of: Callable[[Unit], BlockTrainer],
    sample: Tensor,
    counter: Callable[[], float],
) -> BlockCosts:
    """Return by how much `counter` rises in the teacher's forward of every block and in one step of every unit."""
    teacher, students = zip(*_block_by_block(chain, units, trainer_of, sample, counter), strict=True)
    return BlockCosts(teacher, _by_number(chain, dict(ChainMap(*students))))


def _block_by_block(
    chain: Chain,
    units: Collection[Unit],
    trainer_of: Callable[[Unit], BlockTrainer],
    sample: Tensor,
    counter: Callable[[], float],
) -> Iterator[tuple[float, Mapping[int, float]]]:
    """Yield the counter's rise in every block of the teacher, and in a step of each unit that ends with it."""
    for _, rise, ending in with_boundaries(chain, units, sample, counter):
        students = {}
        for unit, inputs, targets in ending:
            trainer = trainer_of(unit)
            before = counter()
            with trainer.lane.entered():
                trainer.update(inputs, targets)
            students[unit.number] = counter() - before
        yield rise, students


def _by_number(chain: Chain, found: Mapping[int, Number]) -> tuple[Number, ...]:
    """Return what was found by the units' numbers, up to the largest, and for every block's at least; 0 for others."""
    count = max([len(chain.blocks), *(number + 1 for number in found)])
    return tuple(found.get(number, 0) for number in range(count))
