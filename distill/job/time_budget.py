"""budget.seconds: for how long blocks and the whole student are trained, so that the whole command ends in time.

Steps of blocks are decided before they train, the epochs of fine-tuning before it begins; both are recorded, so that a
resumed run does the same work. While the student is fine-tuned, its steps are revised by those that were timed
(timekeeper.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.blocks.memory_format import to_channels_last
from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.job.reconcile import JUDGED
from distill.observability.numbers import show_count, show_seconds
from distill.planning.time_shares import Passes, block_steps, steps_within
from distill.profiling.block_costs import measure_seconds
from distill.storage.run_directory import RunDirectory
from distill.student.assemble import assemble
from distill.student.onnx_programs import onnx_program
from distill.student.programs import contiguous_copy, quietly
from distill.training.horizon import steps_of

log = logging.getLogger(__name__)

BLOCKS, EPOCHS = "block_steps", "finetune_epochs"  # the records
STATES = 3  # of the student, that are evaluated: assembled, reconciled, fine-tuned
FORMS = 4  # of the assembled student, that validation images choose from
TRAINING_PASS = 1.3  # passes in eval mode that one costs in which batch norms look at their batch
TIMED_S = 12.0  # for which programs and networks are timed in the end
ENDING = 0.5  # of the seconds of the start, up to the run directory: the report, and until all processes have ended
INT8 = 1.5  # exports that the programs in INT8 cost
A_LAYER_S = 0.05  # of an export, where none could be tried


def epochs_of(config: JobConfig, run: RunDirectory) -> float:
    """Return the epochs of fine-tuning that a run has: those asked for, or what its budget gave."""
    found = run.result(EPOCHS) if config.budget.seconds is not None else None
    return config.finetune.epochs if found is None else found["epochs"]


def with_block_steps(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> Context:
    """Return the context with the steps of blocks that budget.seconds gives, as it is without a budget. Every rank must
    call it."""
    if context.config.budget.seconds is None:
        return context
    found = context.completed(BLOCKS)
    if found is None:
        passes = _measured(context, dataset, teacher, blocks)

        def work() -> dict[str, Any]:
            export_s = _export_s(context, dataset, teacher)
            after_s = _assembling_s(context, dataset, passes) + _after_s(context, dataset, passes, export_s)
            training_s = _left(context) - context.world_size * after_s
            steps = block_steps(training_s, passes.step, context.world_size)
            return {"steps": steps, "training_s": training_s, "export_s": export_s, "passes": asdict(passes)}

        found = context.lead(BLOCKS, work)
        context.say(
            f"budget: {show_seconds(max(0.0, found['training_s']))} of {_budget(context):g} device seconds are left to "
            f"train in; blocks get {show_count(found['steps'], 'step')}"
        )
    distill = replace(context.config.distill, steps=found["steps"], epochs=None)
    return replace(context, config=replace(context.config, distill=distill))


def expected_steps(context: Context, dataset: Dataset) -> int:
    """Return about how many steps of fine-tuning there will be, as the first attempt expected it: how they are computed
    follows from it. Every rank must call it, after with_block_steps()."""
    if context.config.budget.seconds is None:
        return steps_of(context.config.finetune.epochs, dataset.steps_per_epoch)
    control = context.control
    if context.leads:
        found = context.run.result(EPOCHS)
        control.set("expected steps", _epochs(context, dataset)["steps"] if found is None else found["expected"])
    return control.wait("expected steps", peer=0, purpose="steps of fine-tuning")  # type: ignore[no-any-return]


def with_epochs(context: Context, dataset: Dataset, *, expected: int, faster: float) -> Context:
    """Return the context with the epochs of fine-tuning that what is left of budget.seconds gives, steps being so many
    times as fast as those by which so many were expected; as it is without a budget. Every rank must call it, after
    with_block_steps()."""
    if context.config.budget.seconds is None:
        return context
    found = context.completed(EPOCHS)
    if found is None:
        found = context.lead(EPOCHS, lambda: _told(context, _epochs(context, dataset, faster) | {"expected": expected}))
        deadline = found["deadline_s"]
    else:
        deadline = None  # of another attempt: its steps are taken as they were
    finetune = replace(context.config.finetune, epochs=found["epochs"])
    return replace(context, config=replace(context.config, finetune=finetune), deadline_s=deadline)


def _epochs(context: Context, dataset: Dataset, faster: float = 1.0) -> dict[str, Any]:
    known, ranks = context.run.result(BLOCKS), context.world_size
    passes = Passes(**known["passes"])
    after_s = _after_s(context, dataset, passes, known["export_s"])
    left_s = _left(context) / ranks - after_s
    step_s, epoch_s = passes.step / ranks / faster, validation_s(context, dataset, passes)
    per_epoch = dataset.steps_per_epoch
    steps = steps_within(left_s, step_s=step_s, epoch_s=epoch_s, done=0, steps_per_epoch=per_epoch)
    needed_s = ranks * max(0.0, step_s + epoch_s - left_s)
    # half a step less, so that no rounding makes it one more
    epochs = max(0.0, (steps - 0.5) / per_epoch)
    found = {"epochs": epochs, "steps": steps, "left_s": left_s, "needed_s": needed_s, "after_s": after_s}
    return found | {"deadline_s": time.time() + left_s}


def _told(context: Context, found: dict[str, Any]) -> dict[str, Any]:
    """Say what was decided, and return it."""
    asked = _budget(context)
    if found["steps"] == 0:
        log.warning(
            "budget.seconds=%g: no time is left to fine-tune in, after all else; about %.0f would be needed for %s",
            asked, asked + found["needed_s"], show_count(1, "step"),
        )  # fmt: skip
    else:
        context.say(
            f"budget: fine-tuning gets {show_seconds(found['left_s'])} on {show_count(context.world_size, 'rank')}, "
            f"about {show_count(found['steps'], 'step')}; {show_seconds(found['after_s'])} are kept for what follows"
        )
    return found


def _budget(context: Context) -> float:
    assert context.config.budget.seconds is not None, "asked for before"
    return context.config.budget.seconds


def _left(context: Context) -> float:
    """Return the device seconds that are left of the budget."""
    return _budget(context) - context.world_size * (time.time() - context.started_s)


def validation_s(context: Context, dataset: Dataset, passes: Passes) -> float:
    """Return the seconds in which all ranks judge one student by the validation images."""
    return dataset.num_validation / dataset.batch_size * passes.student / context.world_size


def _assembling_s(context: Context, dataset: Dataset, passes: Passes) -> float:
    """Return the seconds that assembling takes."""
    config = context.config.assemble
    batches = 2 * TRAINING_PASS * config.batchnorm_batches + 2 * config.refit_images / dataset.batch_size
    batches += FORMS * min(JUDGED, dataset.num_validation) / dataset.batch_size
    return batches * passes.student


def _after_s(context: Context, dataset: Dataset, passes: Passes, export_s: float) -> float:
    """Return the seconds from the end of training to the end of the command."""
    tested = dataset.num_test / dataset.batch_size * (passes.teacher + STATES * passes.student) / context.world_size
    judged = STATES * validation_s(context, dataset, passes)
    ending = ENDING * (context.trace.started_s - context.started_s)
    return tested + judged + _delivery_s(context, dataset, passes, export_s) + ending


def _delivery_s(context: Context, dataset: Dataset, passes: Passes, export_s: float) -> float:
    wanted = context.config.deploy.programs
    if not wanted:
        return TIMED_S / 3
    exports = ("pt2" in wanted) + 2 * ("onnx" in wanted)  # the student in both forms; the teacher's is made already
    seconds = export_s * exports + TIMED_S
    if "int8" in wanted:
        images = dataset.num_validation + min(10_000, dataset.num_test)
        seconds += INT8 * export_s + images / dataset.batch_size * (passes.teacher + passes.student)
    return seconds


def _export_s(context: Context, dataset: Dataset, teacher: nn.Module) -> float:
    """Return the seconds of an export: by that of the teacher, which is delivered too and so is made only once."""
    layers = sum(1 for module in teacher.modules() if not any(module.children()))
    if "onnx" not in context.config.deploy.programs:
        return A_LAYER_S * layers
    start = time.monotonic()
    try:
        with quietly():
            plain = contiguous_copy(teacher).eval().requires_grad_(False)
            onnx_program(plain, torch.zeros(2, *dataset.image_shape))
    except Exception:  # whatever an exporter raises, which delivery will tell
        return A_LAYER_S * layers
    return time.monotonic() - start


def _measured(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> Passes:
    """Return the seconds of passes on this job's batches, the means of all ranks, which measure at the same time."""
    control = context.control
    student = assemble(teacher, changed=blocks.changed, blocks=())
    to_channels_last(student, context.device)
    images = dataset.train_batch(0).images
    control.set(f"timing/{context.rank}", True)
    for peer in range(context.world_size):
        control.wait(f"timing/{peer}", peer=peer, purpose="start of the timing")
    seconds = {
        "step": _step_seconds(teacher, student, images),
        "teacher": _forward_seconds(teacher, images),
        "student": _forward_seconds(student.eval(), images),
    }
    control.set(f"passes/{context.rank}", seconds)
    answers = [control.wait(f"passes/{peer}", peer=peer, purpose="timed passes") for peer in range(context.world_size)]
    return Passes(**{name: sum(one[name] for one in answers) / len(answers) for name in seconds})


def _step_seconds(teacher: nn.Module, student: nn.Module, images: Tensor) -> float:
    def step() -> None:
        with torch.no_grad():
            targets = teacher(images)
        functional.mse_loss(student(images), targets).backward()  # type: ignore[no-untyped-call]
        student.zero_grad(set_to_none=True)

    student.train()
    return measure_seconds(step, images.device)


def _forward_seconds(network: nn.Module, images: Tensor) -> float:
    call: Callable[[], object] = torch.no_grad()(lambda: network(images))
    return measure_seconds(call, images.device)
