"""What comes from outside, tried before anything is computed or written."""

from __future__ import annotations

import torch
from torch import nn

from distill.blocks.chain import copied, made_trainable
from distill.config.choices import Amp, Stage
from distill.config.outside import LOSS, OBJECTIVE
from distill.config.schema import JobConfig
from distill.data import Batch
from distill.data.addressing import derive_seed
from distill.job.blocks import Blocks
from distill.training.losses import refuse_unusable_loss
from distill.training.objective import Objective
from distill.training.objectives.making import make_objective, try_out

ROWS = 2


def refuse_unusable_block_loss(config: JobConfig, blocks: Blocks, device: torch.device) -> None:
    """Raise ConfigError on distill.loss unless one from outside gives a loss for the activations of every block."""
    if config.distill.loss in LOSS.own:
        return
    precision = torch.float32 if config.distill.amp is Amp.off else torch.bfloat16
    targets = {blocks.chain.boundaries[unit.target].of_rows(ROWS) for unit in blocks.units.values()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for target in targets:
            student, teacher = (target.conform(torch.randn(target.shape, device=device)) for _ in range(2))
            refuse_unusable_loss(config.distill.loss, student.to(precision), teacher.to(target.dtype))


def refuse_unusable_objective(config: JobConfig, teacher: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Raise ConfigError on finetune.objective or its options unless they can be had, and unless one from outside can
    train, here a copy of the teacher."""
    if config.stage is Stage.all and config.finetune.epochs > 0:
        objective_for(config, made_trainable(copied(teacher)).eval(), teacher, image_shape)


def objective_for(config: JobConfig, student: nn.Module, teacher: nn.Module, image_shape: tuple[int, ...]) -> Objective:
    """Return the configured objective, ready to train the student, which is in eval mode; its own parameters are the
    same on every rank."""
    options, name = config.finetune, config.finetune.objective
    device = next(student.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(config.seed, "objective"))
        settings = {"temperature": options.temperature, "soft_weight": options.soft_weight}
        objective = make_objective(name, options=options.options, settings=settings)
        if name not in OBJECTIVE.own:
            images = torch.randn(ROWS, *image_shape).to(device, memory_format=torch.channels_last)
            labels = torch.zeros(ROWS, dtype=torch.int64, device=device)
            try_out(objective, name, student=student, teacher=teacher, batch=Batch(images, labels))
    return objective
