"""The finetune stage of the job: the assembled student end to end over all ranks, and the best of its epochs kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import nn

from distill.config.choices import Stage
from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.data.addressing import derive_seed
from distill.errors import ConfigError, DistillError
from distill.job.assemble import load_student_state, save_network
from distill.job.blocks import Blocks
from distill.job.companions import companions_for, facts_of, in_words
from distill.job.context import Context
from distill.job.evaluate import held_out_hits
from distill.job.kept_logits import with_kept_logits
from distill.job.objective import with_features, with_fused_views
from distill.job.outside import objective_for
from distill.job.pace import find_pace, times_as_fast
from distill.job.reuse import TEACHER
from distill.job.time_budget import expected_steps, with_epochs
from distill.job.timekeeper import timekeepers
from distill.observability.numbers import show, show_count
from distill.storage.checkpoint import CheckpointFolder
from distill.training.companions import Companion
from distill.training.finetune import Epoch, FitOptions, fit
from distill.training.horizon import Horizon, steps_of
from distill.training.objective import TeacherHere
from distill.training.team import Team

log = logging.getLogger(__name__)

SETBACKS = 3  # halvings of the rate, after losses that are not finite


def refuse_ranks_without_rows(config: JobConfig, *, world_size: int) -> None:
    """Raise ConfigError where ranks share out the rows of a batch and some would have none."""
    if config.data.batch_size >= world_size:
        return
    least = f"at least {world_size}, an image for each rank"
    shared = all(strategy.shares_batches for strategy in config.plan.strategies)
    if shared and config.stage in (Stage.all, Stage.distill):
        allowed = f"{least} with plan.strategy={config.plan.strategy.name}; or fewer ranks"
        raise ConfigError("data.batch_size", config.data.batch_size, allowed)
    if config.finetune.epochs > 0 and config.stage is Stage.all:
        allowed = f"{least} that fine-tunes; or fewer ranks, or finetune.epochs=0"
        raise ConfigError("data.batch_size", config.data.batch_size, allowed)


def finetune_student(
    context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks, *, start: str
) -> list[str]:
    """Distil the student from its state `start` end to end; write that after its best epoch on validation images (the
    later of equals) as finetuned.safetensors. Every rank takes part. Returns that name, or none where no epoch came to
    an end.
    """
    if context.config.finetune.epochs == 0 and context.config.budget.seconds is None:
        return []
    record = context.completed("finetune") or _finetune(context, dataset, teacher, blocks, start)
    kept = record is not None and record["kept_epoch"] is not None
    if not kept and context.config.finetune.sparsity > 0:
        why = (
            f"budget.seconds={context.config.budget.seconds:g} leaves no time for it; raise that"
            if record is None
            else "no epoch came to an end with all of its zeros and finite logits; try a lower finetune.lr"
        )
        raise DistillError(f"{context.run.path}: finetune.sparsity={context.config.finetune.sparsity:g}: {why}")
    return ["finetuned"] if kept else []


def _finetune(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks, start: str) -> Epoch | None:
    """Fine-tune; return the record, None where a budget leaves no time for it."""
    dataset = dataset.with_views(context.config.finetune.views)
    student = load_student_state(context, start, teacher, blocks)
    origin = context.run.origin(TEACHER, f"{start}.safetensors")
    checkpoints = CheckpointFolder(context.run.path, generation=context.control.generation, origin=origin)
    plain = objective_for(context.config, student, teacher, dataset.image_shape)
    objective = with_features(context, plain, student, teacher, blocks)
    expected = expected_steps(context, dataset)
    pace = find_pace(context, dataset, student, teacher, objective, steps=expected)
    context = with_epochs(context, dataset, expected=expected, faster=times_as_fast(context))
    config = context.config.finetune
    if config.epochs == 0:
        return None
    fit_options = FitOptions(epochs=config.epochs, lr=config.lr, weight_decay=config.weight_decay, setbacks=SETBACKS)
    horizon = Horizon(steps_of(config.epochs, dataset.steps_per_epoch))
    source = pace.outputs(TeacherHere(teacher, objective.taps))
    source = with_kept_logits(context, dataset, source, objective, team_of(context, "kept logits"))
    context.say(
        f"finetune: {show_count(round(fit_options.epochs, 2), 'epoch')} over {show_count(context.world_size, 'rank')}, "
        f"peak rate {fit_options.peak(horizon.total):.3g}"
    )

    companions = [*timekeepers(context, dataset, horizon), *companions_for(config, student)]
    judge = Judge(context, dataset, student, options=fit_options, horizon=horizon, companions=companions)
    course = fit(
        student,
        dataset,
        objective,
        teacher=with_fused_views(context, dataset, source),
        companions=companions,
        computing=pace.computing(student, objective.taps, context.device),
        horizon=horizon,
        options=fit_options,
        team=team_of(context, "finetune"),
        device=context.device,
        seed=derive_seed(context.config.seed, "finetune"),
        checkpoints=checkpoints,
        name="finetune",
        report=judge,
    )
    kept = best_epoch(course)
    if kept not in (None, len(course)):
        context.say(f"finetune: the state after epoch {kept} is kept, the best on validation images")
    record = {
        "epochs": course,
        "peak_lr": fit_options.peak(steps_of(config.epochs, dataset.steps_per_epoch)),  # before revisions
        "computed_in": str(pace),
        "seconds": sum(epoch["seconds"] for epoch in course),
        "kept_epoch": kept,
    }
    if context.leads:
        made = [] if kept is None else ["finetuned.safetensors"]
        context.run.complete("finetune", record, made=made, used=[TEACHER, f"{start}.safetensors"])
        checkpoints.remove("finetune")
    return record


@dataclass(frozen=True)
class Judge:
    """Counts the student's hits on validation images after every epoch, keeps its best state, and ends the course where
    as many epochs as finetune.patience says have improved nothing. Every rank's is called."""

    context: Context
    dataset: Dataset
    student: nn.Module
    _: KW_ONLY
    options: FitOptions
    horizon: Horizon
    companions: Sequence[Companion]

    def __call__(self, course: Sequence[Epoch]) -> None:
        """Judge the last epoch of a course, whose record gets what was found."""
        context, epoch, total = self.context, course[-1], self.horizon.total
        number = epoch["epoch"]
        if epoch["loss"] is None:
            if context.leads:
                log.warning(
                    "finetune: stopped, the loss of epoch %d is not finite; try a lower finetune.lr (%g)",
                    number, self.options.peak(total),
                )  # fmt: skip
            return
        hits = held_out_hits(context, f"epoch {number}", self.student, self.dataset)
        top1 = None if hits.not_finite else hits.percent()["top1"]
        epoch |= {"validation_top1": top1} | facts_of(self.companions)
        if context.leads:
            context.scalars.add("epochs/finetune_loss", epoch["loss"], number)
            context.say(
                f"finetune: epoch {number} of {round(total / self.dataset.steps_per_epoch, 2):g}, loss "
                f"{epoch['loss']:.4f}, {epoch['seconds']:.1f} s, {show(top1, '{:.2f} %')} of "
                f"{show_count(hits.images, 'validation image')}{in_words(epoch)}"
            )
        if context.leads and best_epoch(course) == number:
            save_network(context, "finetuned", self.student)
        if is_exhausted(course, context.config.finetune.patience) and epoch["steps"] < total:
            self.horizon.total = epoch["steps"]
            context.say("finetune: it ends here: as many epochs as finetune.patience says have improved nothing")


def best_epoch(course: Sequence[Epoch]) -> int | None:
    """Return the number of the best epoch on validation images, the later of equals; None where there is none. Epochs
    after which the student is not yet as it was asked for, such as less sparse, are not considered."""
    judged = [epoch for epoch in _complete(course) if epoch.get("validation_top1") is not None]
    best = max(judged, key=lambda epoch: (epoch["validation_top1"], epoch["epoch"]), default={"epoch": None})
    return best["epoch"]


def _complete(course: Sequence[Epoch]) -> list[Epoch]:
    return [epoch for epoch in course if epoch.get("complete", True)]


def is_exhausted(course: Sequence[Epoch], patience: int | None) -> bool:
    """Return whether so many epochs in a row have not been better on validation images than the best before them."""
    course = _complete(course)
    if patience is None or len(course) <= patience:
        return False
    before, last = course[:-patience], course[-patience:]
    top1 = [-math.inf if epoch.get("validation_top1") is None else epoch["validation_top1"] for epoch in before]
    return all((epoch.get("validation_top1") or 0.0) <= max(top1) for epoch in last)


def team_of(context: Context, purpose: str) -> Team:
    """Return all ranks as those that train one network, for this purpose."""
    return Team(
        rank=context.rank,
        world_size=context.world_size,
        store=context.control.store_for(purpose) if context.world_size > 1 else None,
        backend=context.roll_call.wire_backend,
        timeout_s=context.config.plan.timeout_s,
        shared_memory=context.config.plan.shared_memory,
    )
