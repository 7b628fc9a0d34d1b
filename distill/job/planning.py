"""From the configuration and the cut teacher to trainers, costs and the plan that is printed before training starts."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict

import torch

from distill.checkpoint import CheckpointFolder, block_name
from distill.config import Cost, JobConfig, Stop, WireDtype
from distill.cost import WIRE_S_PER_BYTE, BlockCosts, average, calibrated, flop_costs, measured_costs
from distill.data import Dataset
from distill.data.addressing import derive_seed
from distill.files import write_json, write_text
from distill.job.context import Context
from distill.job.materials import Blocks
from distill.ledger import Ledger
from distill.plan import Costs, Plan, Span, plan_broadcast
from distill.recipes import replace_convolutions
from distill.report import plan_table
from distill.trainer import BlockTrainer, TrainerOptions

log = logging.getLogger(__name__)


def step_budget(config: JobConfig, dataset: Dataset) -> int:
    """Return the steps of every block."""
    if config.distill.epochs is not None:
        return math.ceil(config.distill.epochs * dataset.steps_per_epoch)
    return config.distill.steps or 0


def wire_dtype(config: JobConfig) -> torch.dtype:
    """Return the precision of the activations that students are given."""
    return torch.bfloat16 if config.plan.wire_dtype is WireDtype.bf16 else torch.float32


class Trainers:
    """Makes the trainers of blocks: fresh, or resumed from their checkpoints."""

    def __init__(self, context: Context, blocks: Blocks, checkpoints: CheckpointFolder, *, budget: int) -> None:
        self._context, self._blocks, self._checkpoints, self._budget = context, blocks, checkpoints, budget

    def fresh(self, block: int) -> BlockTrainer | None:
        """Return a block's trainer at step 0, or None where the block gets no student.

        Its first weights are a function of (seed, block) alone.
        """
        if block not in self._blocks.replaced:
            return None
        config, device = self._context.config, self._context.device
        module = self._blocks.chain.block_module(block)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "student", block))
        replace_convolutions(module, self._blocks.replaced[block], self._blocks.recipe, generator)
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        name = self._blocks.chain.blocks[block].name
        options = trainer_options(config)
        return BlockTrainer(block, name, module, budget=self._budget, device=device, options=options)

    def resumed(self, block: int) -> BlockTrainer:
        """Return a block's trainer at its checkpoint's step, or at step 0 where it has none."""
        trainer = self.fresh(block)
        assert trainer is not None
        checkpoint = self._checkpoints.load(block_name(block))
        if checkpoint is not None:
            trainer.resume(checkpoint)
        return trainer

    def span(self, block: int) -> Span:
        """Return the steps a block has still to do."""
        checkpoint = self._checkpoints.load(block_name(block))
        return Span(block, checkpoint.step if checkpoint else 0, self._budget)


def make_plan(context: Context, dataset: Dataset, blocks: Blocks, trainers: Trainers) -> Plan:
    """Return the plan, the same on every rank: rank 0 makes it for the blocks that its ledger lacks.

    With plan.cost=measured all ranks measure at the same time, as they will train.
    """
    sample = dataset.train_batch(0).images
    flops = flop_costs(blocks.chain, trainers.fresh, sample) if context.leads else None
    seconds = _measure(context, blocks, trainers, sample) if context.config.plan.cost is Cost.measured else None
    if context.leads:
        assert flops is not None
        seconds = seconds or calibrated(flops, blocks.chain, sample)
        ledger = Ledger(context.run.path)
        spans = [trainers.span(block) for block in blocks.replaced if block not in ledger.entries]
        plan = plan_broadcast(_planning_costs(context, blocks, seconds), spans, context.world_size)
        _show(context, blocks, plan, seconds, flops)
        context.control.set("plan", plan.to_json())
    return Plan.from_json(context.control.wait("plan", peer=0, purpose="plan"))


def _measure(context: Context, blocks: Blocks, trainers: Trainers, sample: torch.Tensor) -> BlockCosts | None:
    """Return every block's mean seconds over the ranks on rank 0, None elsewhere."""
    control = context.control
    control.set(f"measuring/{context.rank}", True)
    for peer in range(context.world_size):
        control.wait(f"measuring/{peer}", peer=peer, purpose="start of the measurement")
    control.set(f"costs/{context.rank}", asdict(measured_costs(blocks.chain, trainers.fresh, sample)))
    if not context.leads:
        return None
    found = [control.wait(f"costs/{peer}", peer=peer, purpose="costs") for peer in range(context.world_size)]
    return average([BlockCosts(tuple(costs["teacher"]), tuple(costs["student"])) for costs in found])


def _planning_costs(context: Context, blocks: Blocks, seconds: BlockCosts) -> Costs:
    scale = wire_dtype(context.config).itemsize / torch.float32.itemsize
    sizes = tuple(int(boundary.nbytes * scale) for boundary in blocks.chain.boundaries)
    wire = WIRE_S_PER_BYTE if context.device.type == "cpu" else 0.0
    return Costs(seconds.teacher, seconds.student, sizes, wire)


def _show(context: Context, blocks: Blocks, plan: Plan, seconds: BlockCosts, flops: BlockCosts) -> None:
    """Write plan.json and costs.json and print the plan."""
    names = [block.name for block in blocks.chain.blocks]
    sizes = [boundary.nbytes for boundary in blocks.chain.boundaries]
    write_text(context.run.path / "plan.json", plan.to_json())
    write_json(context.run.path / "costs.json", {"blocks": names, "seconds": asdict(seconds), "flops": asdict(flops)})
    context.console.print(plan_table(plan, names, costs=seconds, flops=flops, boundary_bytes=sizes))
    for rank, predicted in enumerate(plan.predicted_rank_s):
        role = "teacher and students" if rank == 0 else "students"
        context.say(f"rank {rank}: {role}, predicted {predicted:.1f} s")
    context.say(f"plan: {plan.strategy}, predicted makespan {plan.predicted_makespan_s:.1f} s")
    idle = [str(rank) for rank, owned in enumerate(plan.owners) if not owned and rank > 0]
    if idle and plan.spans:
        log.warning("plan: more ranks than blocks to train: ranks %s stay idle", ", ".join(idle))


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
