"""From a configuration to what its blocks cost on a described device: the architecture alone, no weights or data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.blocks.memory_format import to_channels_last
from distill.config.choices import Amp, DataName
from distill.config.compose import compose
from distill.config.schema import JobConfig
from distill.errors import ConfigError
from distill.job.blocks import Blocks, cut_blocks
from distill.job.cache import is_cached, students_dtype
from distill.job.teacher import architecture_of
from distill.job.trainers import trainer_options
from distill.planning.costs import Costs, Span
from distill.planning.unit import Unit
from distill.simulation.hardware import Device, Operation
from distill.simulation.operations import Recorder
from distill.teachers import build_architecture
from distill.training.optim import FIXED_RATE
from distill.training.trainer import BlockTrainer

NUM_CLASSES = {DataName.digits: 10, DataName.cifar10: 10, DataName.cifar100: 100}  # other data: ImageNet's 1000
META, CPU = torch.device("meta"), torch.device("cpu")


def imagined_costs(overrides: Sequence[str], device: Device, *, steps: int | None = None) -> tuple[Costs, list[Span]]:
    """Return the costs of the main job with these overrides on ranks of that device (their network left open), and the
    steps of all of its blocks. Nothing is downloaded, opened or computed.

    Raises ConfigError naming the setting.
    """
    config = compose(["data.root=.", *overrides])  # no image is read, so none need be there
    budget = steps or config.distill.steps
    if budget is None or (config.distill.epochs is not None and not steps):
        raise ConfigError("distill.epochs", config.distill.epochs, "--steps N: without data, epochs have no length")
    if config.search.on:
        given = next(iter(config.search.budget.given()))
        allowed = (
            "null: which recipe a block has would be chosen by its scores, for which weights and images are needed"
        )
        raise ConfigError(f"search.budget.{given}", getattr(config.search.budget, given), allowed)
    if config.teacher.amp is not Amp.off:
        raise ConfigError("teacher.amp", config.teacher.amp.name, "off: kernels of an imagined teacher are in float32")
    if is_cached(config):
        raise ConfigError(
            "teacher.cache", config.teacher.cache.name, "off: strategies that share a teacher are simulated"
        )
    blocks = _cut(config)
    teacher = _teacher_operations(blocks)
    students = {number: _student(config, blocks, unit) for number, unit in blocks.units.items()}
    numbers = range(max(len(teacher), 1 + max(students)))
    costs = Costs(
        tuple(map(device.seconds, teacher)),
        tuple(device.seconds(students[number][1]) if number in students else 0.0 for number in numbers),
        tuple(boundary.numel * students_dtype(config).itemsize for boundary in blocks.chain.boundaries),
        tuple(students[number][0] if number in students else 0 for number in numbers),
        batch_size=config.data.batch_size if blocks.chain.divisible else None,
        teacher_fixed_s=tuple(map(device.gaps_s, teacher)),
        student_fixed_s=tuple(device.gaps_s(students[number][1]) if number in students else 0.0 for number in numbers),
    )
    return costs, [Span.of(unit, 0, budget) for unit in blocks.units.values()]


def _cut(config: JobConfig) -> Blocks:
    """Build the teacher without its weights, and cut it."""
    teacher = build_architecture(**architecture_of(config, NUM_CLASSES.get(config.data.name, 1000))).to(META)
    to_channels_last(teacher)
    shape = (3, config.data.side, config.data.side)
    return cut_blocks(config, shape, teacher, META)


def _teacher_operations(blocks: Blocks) -> list[list[Operation]]:
    """Return the kernels of every block's forward pass."""
    chain = blocks.chain
    form = chain.boundaries[0]
    sample = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=META)
    with Recorder() as recorder:
        counts = [rise for rise, _ in chain.counted(sample, recorder.count)]
    remaining = iter(recorder.operations)
    return [list(islice(remaining, int(rise))) for rise in counts]


def _student(config: JobConfig, blocks: Blocks, unit: Unit) -> tuple[int, list[Operation]]:
    """Return the bytes of a unit's parameters and the kernels of one of its steps."""
    chain = blocks.chain
    module = blocks.build(unit.number)
    to_channels_last(module)
    size = sum(parameter.nbytes for parameter in module.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = _trainer(config, unit, module)
        inputs, targets = (
            torch.empty_strided(form.shape, form.stride, dtype=form.dtype)
            for form in (chain.boundaries[unit.input], chain.boundaries[unit.target])
        )
        trainer.update(inputs, targets)  # the first step makes the optimizer's state
        with Recorder() as recorder:
            trainer.update(inputs, targets)
    return size, recorder.operations


def _trainer(config: JobConfig, unit: Unit, module: nn.Module) -> BlockTrainer:
    """Return a trainer that never reads losses, and takes no rate from weights: imagined ones have no values."""
    options = replace(trainer_options(config), log_every=1_000_000, lr=FIXED_RATE)
    trainer = BlockTrainer(unit, module.to_empty(device=CPU), budget=1_000_000, device=CPU, options=options)
    trainer.step = 1
    return trainer
