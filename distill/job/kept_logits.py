"""The teacher's logits of fixed views (finetune.views): refused without room for them, kept where that saves passes."""

from __future__ import annotations

import time

from distill.cache.places import GIB
from distill.config.choices import Stage
from distill.config.outside import OBJECTIVE
from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.errors import ConfigError
from distill.job.context import Context
from distill.observability.numbers import show_count
from distill.training.kept_logits import keep_logits, most_bytes
from distill.training.objective import Objective, TeacherOutputs
from distill.training.team import Team


def refuse_unkept(config: JobConfig, dataset: Dataset, *, ranks_here: int) -> None:
    """Raise ConfigError on finetune.views where logits of so many would take more memory than cache.max_gib."""
    views = config.finetune.views
    if views is None or config.stage is not Stage.all:
        return
    fixed = dataset.with_views(views)
    needed = ranks_here * most_bytes(fixed) / GIB
    if config.finetune.epochs > fixed.num_views and needed > config.cache.max_gib:
        allowed = (
            f"fewer, or cache.max_gib >= {needed:.3g}: the logits of {show_count(dataset.num_train, 'image')} in "
            f"{show_count(views, 'view')}, on each of {show_count(ranks_here, 'rank')} of a host; or null"
        )
        raise ConfigError("finetune.views", views, allowed)


def with_kept_logits(
    context: Context, dataset: Dataset, teacher: TeacherOutputs, objective: Objective, team: Team
) -> TeacherOutputs:
    """Return the teacher with the logits of the data set's fixed views looked up, found now; as it is, where nothing
    would be looked up twice, or nothing at all. Every rank must call it."""
    config = context.config.finetune
    if config.views is None:
        return teacher
    asked = config.soft_weight > 0 or config.objective not in OBJECTIVE.own
    why = None
    if not asked:
        why = "the teacher is not asked"
    elif objective.taps:
        why = f"the objective sees activations too ({', '.join(objective.taps)})"
    elif config.epochs <= dataset.num_views:
        why = "no view is seen twice"
    if why is not None:
        context.say(f"finetune: {show_count(dataset.num_views, 'fixed view')}, whose logits are not kept: {why}")
        return teacher
    start = time.monotonic()
    kept = keep_logits(dataset, teacher, team)
    context.say(
        f"finetune: the teacher's logits of {show_count(dataset.num_train, 'image')} in "
        f"{show_count(dataset.num_views, 'view')} found in {time.monotonic() - start:.1f} s and kept, "
        f"{kept.nbytes / 2**20:.1f} MiB a rank"
    )
    return kept
