"""What the student is fine-tuned for: the configured objective, what is added to it, and the teacher's outputs."""

from __future__ import annotations

import logging

import torch
from torch import nn

from distill.data import Batch, Dataset
from distill.job.blocks import Blocks, sample_images
from distill.job.context import Context
from distill.job.outside import objective_for
from distill.training.fused_views import FusedViews
from distill.training.objective import Address, Objective, TeacherHere, TeacherOutputs
from distill.training.objectives.fading_features import FadingFeatures, like_the_teachers

log = logging.getLogger(__name__)


def prepared(
    context: Context, dataset: Dataset, student: nn.Module, teacher: nn.Module, blocks: Blocks
) -> tuple[Objective, TeacherOutputs]:
    """Return what the student, which is in eval mode, will be trained for, and the source of the teacher's outputs."""
    config = context.config.finetune
    objective = objective_for(context.config, student, teacher, dataset.image_shape)
    if config.feature_weight > 0:
        paths = _boundaries_alike(context, dataset.image_shape, student, teacher, blocks)
        objective = FadingFeatures(objective, paths, weight=config.feature_weight) if paths else objective
    here = TeacherHere(teacher, objective.taps)
    if config.fused_views == 1:
        return objective, here

    def redrawn(address: Address, number: int) -> Batch:
        return dataset.redrawn(address.step, number, address.part, address.num_parts)

    # One that softens each prediction by itself is given the mean of predictions as they are.
    softened = config.temperature if config.objective == "distillation" else 1.0
    return objective, FusedViews(here, redrawn, num_views=config.fused_views, temperature=softened)


def _boundaries_alike(
    context: Context, image_shape: tuple[int, ...], student: nn.Module, teacher: nn.Module, blocks: Blocks
) -> list[str]:
    """Return the paths of the modules at the ends of changed blocks that give the same shape in student and teacher;
    the others are told."""
    modules = dict(teacher.named_modules())
    ends = {one.target for one in blocks.candidates.values()} - {len(blocks.chain.blocks)}  # where the logits are
    names = [blocks.chain.blocks[end - 1].name for end in sorted(ends)]
    asked = [name if name in modules else name.rpartition("-")[2] for name in names]  # of a group, "first-last"
    images = sample_images(image_shape, context.device).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.zeros(len(images), dtype=torch.int64, device=context.device))
    paths, others = like_the_teachers(asked, student=student, teacher=teacher, batch=batch)
    for path, why in others.items():
        context.say(f"finetune.feature_weight: not behind {path} ({why})")
    if paths:
        context.say(f"finetune: beside the logits, what leaves {', '.join(paths)}")
    elif context.leads:
        log.warning("finetune.feature_weight has no effect: no block gives activations of the teacher's shape")
    return paths
