"""The refine stage of the job: blocks of the assembled student trained on what they get in it, over all ranks; kept
where validation images say that it is better.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.blocks.memory_format import to_channels_last
from distill.config.choices import Order, Stage, TrainingAmp
from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.data.addressing import derive_seed
from distill.errors import ConfigError
from distill.job.assemble import load_student_state, save_network
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.job.evaluate import held_out_hits
from distill.job.finetune import SETBACKS, team_of
from distill.job.pace import Pace
from distill.job.reuse import TEACHER
from distill.observability.numbers import show, show_count
from distill.storage.aliases import load_state, versioned
from distill.storage.checkpoint import CheckpointFolder
from distill.student.evaluate import best_of
from distill.training.finetune import Epoch, FitOptions, fit
from distill.training.horizon import Horizon, usual_rate
from distill.training.objective import Distillation
from distill.training.progressive import Amid, Progressive, Target, TeacherBlocks
from distill.training.trainer import drops

log = logging.getLogger(__name__)

STAGE, BEFORE, REFINED = "refine", "recalibrated", "refined"


@dataclass(frozen=True)
class Turn:
    """What is trained at a time: a network of which some blocks learn, what of the teacher its taps are for, and up to
    which block both run. Its `key` tells it from others of the stage."""

    name: str
    key: str
    network: nn.Module
    targets: Mapping[str, Target]
    last: int


def refuse_unrefinable(config: JobConfig, blocks: Blocks, *, world_size: int) -> None:
    """Raise ConfigError where the student is to be refined and cannot be."""
    if not config.refine.on or config.stage is not Stage.all:
        return
    if not blocks.chain.divisible:
        allowed = "off: this network is run through hooks, and none of its blocks alone"
        raise ConfigError("refine.method", config.refine.method.name, allowed)
    if config.refine.order is Order.bottom_up and config.refine.whole_weight > 0:
        narrow = [unit.name for unit in blocks.units.values() if unit.gives is not None]
        if narrow:
            allowed = f"together: the teacher cannot go on from the fewer channels that {', '.join(narrow)} give"
            raise ConfigError("refine.order", config.refine.order.name, f"{allowed}; or refine.whole_weight=0")
    if config.data.batch_size < world_size:
        allowed = f"at least {world_size}, an image for each rank that refines; or fewer ranks, or refine=off"
        raise ConfigError("data.batch_size", config.data.batch_size, allowed)


def refine_student(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> list[str]:
    """Train the blocks of the reconciled student on their own inputs; write the result as refined.safetensors. Every
    rank takes part. Returns that name, or none where validation images say that it was better before."""
    if not context.config.refine.on:
        return []
    record = context.completed(STAGE)
    if record is None:
        with context.during(STAGE):
            record = _refine(context, dataset, teacher, blocks)
    return [REFINED] if record["kept"] else []


def _refine(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> dict[str, Any]:
    start, config = time.monotonic(), context.config.refine
    student = load_student_state(context, BEFORE, teacher, blocks)
    hits = {BEFORE: held_out_hits(context, "student before it is refined", student, dataset)}
    row = _row(context, blocks, student)
    origin = context.run.origin(TEACHER, f"{BEFORE}.safetensors")
    checkpoints = CheckpointFolder(context.run.path, generation=context.control.generation, origin=origin)
    turns = _bottom_up(context, blocks, row) if config.order is Order.bottom_up else [_together(blocks, row)]
    courses, keys = {}, []
    for turn in turns:
        courses[turn.name] = _learn(context, dataset, blocks, turn, checkpoints)
        keys.append(turn.key)
        if courses[turn.name][-1]["loss"] is None:
            break  # what follows would get nothing but that
    states = {name: tensor for module in row for name, tensor in module.state_dict().items()}
    student.load_state_dict(versioned(student, states), strict=False)
    hits[REFINED] = held_out_hits(context, "student after it was refined", student, dataset)
    kept = best_of(hits) == REFINED
    top1 = {name: None if one.not_finite else one.percent()["top1"] for name, one in hits.items()}
    context.say(
        f"refine: {show_count(config.steps, 'step')} of every block, validation top-1 "
        f"{show(top1[BEFORE], '{:.2f} %')} before and {show(top1[REFINED], '{:.2f} %')} after"
        + ("" if kept else ": the student stays as it was")
    )
    record = {
        "seconds": time.monotonic() - start,
        "steps": config.steps,
        "validation_top1": top1,
        "kept": kept,
        "courses": courses,
    }
    if context.leads:
        if kept:
            save_network(context, REFINED, student)
        made, used = [f"{REFINED}.safetensors"] if kept else [], [TEACHER, f"{BEFORE}.safetensors"]
        context.run.complete(STAGE, record, made=made, used=used)
        for key in keys:
            checkpoints.remove(key)
    return record


def _row(context: Context, blocks: Blocks, student: nn.Module) -> list[nn.Module]:
    """Return the student's blocks with the weights that they have in it."""
    replaced = {one.input: number for number, one in blocks.candidates.items()}
    state, row = student.state_dict(), []
    for block in range(len(blocks.chain.blocks)):
        module = blocks.build(replaced[block]) if block in replaced else blocks.chain.block_module(block)
        load_state(module, {name: state[name] for name in module.state_dict()})
        to_channels_last(module, context.device)
        row.append(module.eval())
    return row


def _together(blocks: Blocks, row: Sequence[nn.Module]) -> Turn:
    """All blocks at once: the student itself, which is tapped at the end of every block that has a student."""
    targets = {str(unit.input): Target(unit.target, unit.gives) for unit in blocks.units.values()}
    return Turn("all blocks", STAGE, nn.Sequential(*row), targets, last=len(row))


def _bottom_up(context: Context, blocks: Blocks, row: Sequence[nn.Module]) -> Iterator[Turn]:
    """One block after another, below it the student's as they have become, above it the teacher's; without the whole
    network's loss nothing."""
    whole = context.config.refine.whole_weight > 0
    teachers = [blocks.chain.block_module(block) for block in range(len(row))] if whole else []
    for module in teachers:
        to_channels_last(module, context.device)
    for unit in sorted(blocks.units.values(), key=lambda one: one.input):
        network = Amid(row[: unit.input], row[unit.input], teachers[unit.target :])
        target = Target(unit.target, unit.gives)
        last = len(row) if whole else unit.target
        yield Turn(unit.name, f"{STAGE}_{unit.input:02d}", network, {"block": target}, last)


def _learn(
    context: Context, dataset: Dataset, blocks: Blocks, turn: Turn, checkpoints: CheckpointFolder
) -> list[Epoch]:
    """Train what a turn is about, in place; return its course. Every rank must call it."""
    config, end = context.config.refine, context.config.finetune
    whole = Distillation(temperature=end.temperature, soft_weight=end.soft_weight)
    rate = usual_rate(config.steps) if config.lr is None else config.lr
    in_bf16 = end.amp is TrainingAmp.bf16

    def report(course: Sequence[Epoch]) -> None:
        loss = course[-1]["loss"]
        if context.leads and loss is None:
            log.warning("refine: %s: stopped, the loss is not finite; try a lower refine.lr (%g)", turn.name, rate)
        context.say(
            f"refine: {turn.name}, step {course[-1]['steps']} of {config.steps}, loss {show(loss, '{:.4f}')}, "
            f"{course[-1]['seconds']:.1f} s"
        )

    return fit(
        turn.network,
        dataset,
        Progressive([*turn.targets], whole, weight=config.whole_weight),
        teacher=TeacherBlocks(blocks.chain, turn.targets, last=turn.last),
        in_eval=[path for path, module in turn.network.named_modules() if drops(module)],
        computing=Pace(bf16=in_bf16, one_kernel=in_bf16).computing(turn.network, turn.targets, context.device),
        horizon=Horizon(config.steps),
        options=FitOptions(
            epochs=config.steps / dataset.steps_per_epoch,
            lr=rate,
            weight_decay=end.weight_decay,
            setbacks=SETBACKS,
        ),
        team=team_of(context, turn.key),
        device=context.device,
        seed=derive_seed(context.config.seed, turn.key),
        checkpoints=checkpoints,
        name=turn.key,
        report=report,
    )
