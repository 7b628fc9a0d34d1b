"""From the configuration and the cut teacher to trainers, costs and the plan that is printed before training starts."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from distill.blocks.memory_format import to_channels_last
from distill.config.choices import Cost, Stop, Strategy
from distill.config.schema import JobConfig
from distill.cuda.lanes import Lane, lanes
from distill.data import Dataset
from distill.data.addressing import derive_seed
from distill.distributed.store import ranks_of
from distill.errors import ConfigError
from distill.job.blocks import Blocks
from distill.job.cache import Caching, students_dtype
from distill.job.context import Context
from distill.job.memory import find_memory, fitting_plans, show_memory
from distill.job.network import find_network
from distill.job.reuse import TEACHER
from distill.planning.memory_model import Memory
from distill.planning.plan import Costs, Plan, Span, memory_of
from distill.profiling.block_costs import (
    BlockCosts,
    Students,
    average,
    calibrated,
    flop_costs,
    measured_costs,
    slowness,
    sustained_costs,
)  # fmt: skip
from distill.profiling.peak_memory import PeakMemory
from distill.profiling.sizes import Sizes, block_sizes
from distill.recipes import replace_convolutions
from distill.report import plan_table
from distill.storage.checkpoint import CheckpointFolder, unit_name
from distill.storage.files import write_json
from distill.storage.ledger import Ledger
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer

log = logging.getLogger(__name__)


def step_budget(config: JobConfig, dataset: Dataset) -> int:
    """Return the steps of every block."""
    if config.distill.epochs is not None:
        return math.ceil(config.distill.epochs * dataset.steps_per_epoch)
    return config.distill.steps or 0


class Trainers:
    """Makes the trainers of units: fresh, or resumed from their checkpoints."""

    def __init__(self, context: Context, blocks: Blocks, checkpoints: CheckpointFolder, *, budget: int) -> None:
        self._context, self._blocks, self._checkpoints, self._budget = context, blocks, checkpoints, budget
        self._student_bytes: dict[int, int] = {}
        graphs = context.device.type == "cuda" and context.config.distill.cuda_graphs
        self._lanes = lanes(context.device) if graphs else [Lane()]

    @property
    def students(self) -> Students:
        """What makes a fresh trainer of every unit."""
        return {unit: partial(self.fresh, number) for number, unit in self._blocks.units.items()}

    def fresh(self, number: int) -> BlockTrainer:
        """Return a unit's trainer at step 0. Its first weights are a function of (seed, the unit's key) alone."""
        config, device, unit = self._context.config, self._context.device, self._blocks.units[number]
        module = self._blocks.chain.block_module(unit.input)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "student", unit.key))
        replace_convolutions(module, self._blocks.replaced[unit.input], self._blocks.recipe, generator)
        to_channels_last(module, device)
        self._student_bytes[number] = sum(parameter.nbytes for parameter in module.parameters())
        lane = self._lanes[number % len(self._lanes)]
        options = trainer_options(config)
        return BlockTrainer(unit, module, budget=self._budget, device=device, options=options, lane=lane)

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


def make_plan(
    context: Context, dataset: Dataset, blocks: Blocks, trainers: Trainers, caching: Caching | None
) -> tuple[Plan, Memory | None]:
    """Return the plan, the same on every rank: rank 0 makes it for the blocks that its ledger lacks; and on rank 0 the
    memory that the plan keeps to.

    With plan.cost=measured all ranks measure at the same time, as they will train.
    """
    sample = dataset.train_batch(0).images
    flops = flop_costs(blocks.chain, trainers.students, sample) if context.leads else None
    peak, peak_bytes = PeakMemory(context.device), None
    measured = None
    if context.config.plan.cost is Cost.measured:
        measured = _measure(context, dataset, blocks, trainers, steps=step_budget(context.config, dataset))
        peak_bytes = peak.read()
    network = find_network(context)
    memory = None
    if context.leads:
        assert flops is not None
        seconds, speeds = measured or (calibrated(flops, blocks.chain, sample), ())
        ledger = Ledger(context.run.path, origin=context.run.origin(TEACHER))
        spans = [trainers.span(number) for number in blocks.units if number not in ledger.entries]
        names = _candidates(context, blocks)
        sizes = tuple(map(trainers.student_bytes, range(len(seconds.student))))
        costs = replace(_planning_costs(context, blocks, seconds, speeds, sizes), network=network)
        memory = find_memory(context, blocks.chain, trainers.students, sample, sizes, peak_bytes=peak_bytes)
        costs = replace(costs, memory=memory)
        plans = fitting_plans(context, names, costs, spans)
        _show_ranking(context, plans)
        plan = plans[0] if caching is None else caching.plan(costs, spans, without=plans[0])
        if measured is not None and caching is None:
            plan = plan.started_in(dataset.measure_start())
        write_json(context.run.path / "plan.json", asdict(plan))
        write_json(context.run.path / "costs.json", _as_json(blocks, seconds, flops, costs, plan))
        _show(context, blocks, plan, seconds, block_sizes(blocks.chain, trainers.students, sample))
        show_memory(context, plan, costs)
        context.control.set("plan", plan.to_json())
    return Plan.from_json(context.control.wait("plan", peer=0, purpose="plan")), memory


def refuse_impossible(config: JobConfig, blocks: Blocks, *, world_size: int) -> None:
    """Raise ConfigError where that many ranks cannot run the asked plan on this network."""
    wanted, teacher_ranks = config.plan.strategy, config.plan.teacher_ranks
    if teacher_ranks is not None and teacher_ranks > world_size:
        raise ConfigError("plan.teacher_ranks", teacher_ranks, f"at most the number of ranks, {world_size}")
    if wanted is Strategy.relay and not blocks.chain.divisible:
        raise ConfigError(
            "plan.strategy", "relay", "another strategy: this network is run through hooks, not block by block"
        )


def _candidates(context: Context, blocks: Blocks) -> list[str]:
    """Return the planners to choose from. Those that exist to be measured against are never chosen."""
    wanted, divisible = context.config.plan.strategy, blocks.chain.divisible
    relays = ["relay", "groups"] if context.config.plan.groups else ["relay"]
    if wanted is Strategy.auto:
        return ["broadcast", "replicate", *(relays if divisible else [])]
    return relays if wanted is Strategy.relay else [wanted.name]


def _show_ranking(context: Context, plans: Sequence[Plan]) -> None:
    if len(plans) > 1:
        ranking = ", ".join(f"{plan.label} {plan.predicted_makespan_s:.1f} s" for plan in plans)
        context.say(f"plan: predicted makespans: {ranking}")


def _measure(
    context: Context, dataset: Dataset, blocks: Blocks, trainers: Trainers, *, steps: int
) -> tuple[BlockCosts, tuple[float, ...]] | None:
    """Return every block's mean seconds over the ranks and how slow each rank is, on rank 0; None elsewhere."""
    control = context.control
    control.set(f"measuring/{context.rank}", True)
    for peer in range(context.world_size):
        control.wait(f"measuring/{peer}", peer=peer, purpose="start of the measurement")
    _, _, local_rank, num_local = ranks_of(os.environ)
    if context.device.type == "cuda":
        with closing(dataset.train_batches(0, sys.maxsize)) as batches:
            own = sustained_costs(blocks.chain, trainers.students, lambda: next(batches).images)
    else:
        sample = dataset.train_batch(0).images
        own = measured_costs(blocks.chain, trainers.students, sample, steps=steps, ahead=local_rank / num_local)
    control.set(f"costs/{context.rank}", asdict(own))
    if not context.leads:
        return None
    answers = [control.wait(f"costs/{peer}", peer=peer, purpose="costs") for peer in range(context.world_size)]
    found = [BlockCosts(tuple(costs["teacher"]), tuple(costs["student"])) for costs in answers]
    return average(found), slowness(found)


def _planning_costs(
    context: Context, blocks: Blocks, seconds: BlockCosts, speeds: tuple[float, ...], student_bytes: tuple[int, ...]
) -> Costs:
    sizes = tuple(boundary.numel * students_dtype(context.config).itemsize for boundary in blocks.chain.boundaries)
    batch_size = blocks.chain.boundaries[0].shape[0]
    return Costs(seconds.teacher, seconds.student, sizes, student_bytes, speeds, batch_size=batch_size)


def _as_json(blocks: Blocks, seconds: BlockCosts, flops: BlockCosts, costs: Costs, plan: Plan) -> dict[str, Any]:
    """Return what `distill simulate` and the report need to know of the costs."""
    return {
        "blocks": [block.name for block in blocks.chain.blocks],
        "units": {number: unit.name for number, unit in blocks.units.items()},
        "seconds": asdict(seconds),
        "flops": asdict(flops),
        "boundary_bytes": costs.boundary_bytes,
        "student_bytes": costs.student_bytes,
        "slowness": costs.slowness,
        "memory": asdict(costs.memory) if costs.memory else None,
        "peak_memory_bytes": memory_of(plan, costs.memory) if costs.memory else [],
        "network": {
            "within": costs.network.within.facts(),
            "between": costs.network.between.facts(),
            "hosts": costs.network.hosts,
        },
    }


def _show(context: Context, blocks: Blocks, plan: Plan, seconds: BlockCosts, sizes: tuple[Sizes, Sizes]) -> None:
    """Print the plan."""
    names = [block.name for block in blocks.chain.blocks]
    context.console.print(plan_table(plan, names, blocks.units.values(), sizes=sizes, costs=seconds))
    for rank, predicted in enumerate(plan.predicted_rank_s):
        context.say(f"rank {rank}: {_role(plan, rank)}, predicted {predicted:.1f} s")
    within = f" (within {100 * plan.gap:.2g} % of the optimum)" if plan.gap else ""
    context.say(f"plan: {plan.label}, predicted makespan {plan.predicted_makespan_s:.1f} s{within}")
    if plan.start_s:
        context.say(f"plan: of that {plan.start_s:.1f} s until images are decoded: processes that do it have to start")
    idle = [str(rank) for rank in range(1, plan.world_size) if not plan.has_work(rank)]
    if idle and plan.spans:
        log.warning("plan: more ranks than blocks to train: ranks %s stay idle", ", ".join(idle))


def _role(plan: Plan, rank: int) -> str:
    """What a rank does."""
    parts = ["teacher"] * plan.teaches(rank) + ["students"] * bool(plan.trained_by(rank))
    others = ", ".join(str(peer) for peer in plan.group_of(rank) if peer != rank)
    return (" and ".join(parts) or "idle") + (f" with rank{'s' * (',' in others)} {others}" if others else "")


def trainer_options(config: JobConfig) -> TrainerOptions:
    """Return how the configuration wants every block trained."""
    options = config.distill
    return TrainerOptions(
        loss=options.loss.name,
        optimizer=options.optimizer.name,
        lr=options.lr,
        momentum=options.momentum,
        smoothing=options.smoothing,
        weight_decay=options.weight_decay,
        schedule=options.schedule.name,
        warmup_steps=options.warmup_steps,
        clip_norm=options.clip_norm,
        amp=options.amp.name,
        patience=options.patience if options.stop is Stop.plateau else 0,
        min_delta=options.min_delta,
        log_every=options.log_every,
    )
