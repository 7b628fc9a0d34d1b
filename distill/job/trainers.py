"""Trainers of units: fresh, or at their last checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

from distill.blocks.chain import made_trainable
from distill.blocks.memory_format import to_channels_last
from distill.config.choices import Stop
from distill.config.plain import options_of
from distill.config.schema import JobConfig
from distill.cuda.lanes import Lane, lanes
from distill.data import Dataset
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.job.first_weights import first_weights
from distill.planning.costs import Span
from distill.profiling.block_costs import (
    Students,
)  # fmt: skip
from distill.storage.checkpoint import CheckpointFolder, unit_name
from distill.training.horizon import steps_of
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer

log = logging.getLogger(__name__)


def step_budget(config: JobConfig, dataset: Dataset) -> int:
    """Return the steps of every block."""
    if config.distill.epochs is not None:
        return steps_of(config.distill.epochs, dataset.steps_per_epoch)
    return config.distill.steps or 0


class Trainers:
    """Makes the trainers of units: fresh, or resumed from their checkpoints."""

    def __init__(
        self,
        context: Context,
        blocks: Blocks,
        checkpoints: CheckpointFolder,
        *,
        budget: int,
        start: Mapping[int, float],
    ) -> None:
        """`start` are the relative errors of first weights, by a unit's number."""
        self._context, self._blocks, self._checkpoints, self._budget = context, blocks, checkpoints, budget
        self._start = start
        self._student_bytes: dict[int, int] = {}
        graphs = context.device.type == "cuda" and context.config.distill.cuda_graphs
        self._lanes = lanes(context.device) if graphs else [Lane()]

    @property
    def students(self) -> Students:
        """What makes a fresh trainer of every unit."""
        return {unit: partial(self.fresh, number) for number, unit in self._blocks.units.items()}

    def fresh(self, number: int) -> BlockTrainer:
        """Return a unit's trainer at step 0, with its first weights."""
        config, device, unit = self._context.config, self._context.device, self._blocks.units[number]
        module = made_trainable(self._blocks.student(number, first_weights(self._context, number)))
        to_channels_last(module, device)
        self._student_bytes[number] = sum(parameter.nbytes for parameter in module.parameters())
        lane = self._lanes[number % len(self._lanes)]
        options = trainer_options(config)
        trainer = BlockTrainer(unit, module, budget=self._budget, device=device, options=options, lane=lane)
        # Until its first step has been read, which with a budget of none is never.
        trainer.progress.rel_error_first = trainer.progress.rel_error_last = self._start[number]
        return trainer

    def resumed(self, number: int) -> BlockTrainer:
        """Return a unit's trainer at its checkpoint's step, or at step 0 where it has none."""
        trainer = self.fresh(number)
        checkpoint = self._checkpoints.load(unit_name(number))
        if checkpoint is not None:
            trainer.resume(checkpoint)
        return trainer

    def student_bytes(self, number: int) -> int:
        """Return the bytes of a unit's parameters, 0 where no unit has the number."""
        if number in self._blocks.units and number not in self._student_bytes:
            self.fresh(number)
        return self._student_bytes.get(number, 0)

    def span(self, number: int) -> Span:
        """Return the steps a unit has still to do."""
        checkpoint = self._checkpoints.load(unit_name(number))
        return Span.of(self._blocks.units[number], checkpoint.step if checkpoint else 0, self._budget)


def trainer_options(config: JobConfig) -> TrainerOptions:
    """Return how the configuration wants every block trained."""
    patience = config.distill.patience if config.distill.stop is Stop.plateau else 0
    return options_of(TrainerOptions, config.distill, patience=patience)
