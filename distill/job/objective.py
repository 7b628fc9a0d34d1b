"""What may be added to the objective of fine-tuning, and to what the teacher says of an image."""

from __future__ import annotations

import logging

import torch
from torch import nn

from distill.data import Batch, Dataset
from distill.job.blocks import Blocks, sample_images
from distill.job.context import Context
from distill.training.fused_views import FusedViews
from distill.training.kept_logits import KeptLogits
from distill.training.objective import Address, Objective, TeacherOutputs
from distill.training.objectives.fading_features import FadingFeatures, like_the_teachers

log = logging.getLogger(__name__)


def with_features(
    context: Context, objective: Objective, student: nn.Module, teacher: nn.Module, blocks: Blocks
) -> Objective:
    """Return the objective with the activations at the ends of changed blocks beside it, where finetune.feature_weight
    asks for them; student and teacher are in eval mode."""
    weight = context.config.finetune.feature_weight
    paths = _boundaries_alike(context, student, teacher, blocks) if weight > 0 else []
    return FadingFeatures(objective, paths, weight=weight) if paths else objective


def with_fused_views(context: Context, dataset: Dataset, source: TeacherOutputs) -> TeacherOutputs:
    """Return the teacher's outputs with logits over several views of an image, where finetune.fused_views asks for
    that."""
    config = context.config.finetune
    if config.fused_views == 1:
        return source
    # One that softens each prediction by itself is given the mean of predictions as they are.
    softened = config.temperature if config.objective == "distillation" else 1.0
    if isinstance(source, KeptLogits):
        return source.fused(softened)

    def redrawn(address: Address, number: int) -> Batch:
        return dataset.redrawn(address.step, number, address.part, address.num_parts)

    return FusedViews(source, redrawn, num_views=config.fused_views, temperature=softened)


def _boundaries_alike(context: Context, student: nn.Module, teacher: nn.Module, blocks: Blocks) -> list[str]:
    """Return the paths of the modules at the ends of changed blocks that give the same shape in student and teacher;
    the others are told."""
    modules = dict(teacher.named_modules())
    ends = {one.target for one in blocks.candidates.values()} - {len(blocks.chain.blocks)}  # where the logits are
    names = [blocks.chain.blocks[end - 1].name for end in sorted(ends)]
    asked = [name if name in modules else name.rpartition("-")[2] for name in names]  # of a group, "first-last"
    image_shape = blocks.chain.boundaries[0].shape[1:]
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
