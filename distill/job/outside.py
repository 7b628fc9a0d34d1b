"""What comes from outside, tried before anything is computed or written."""

from __future__ import annotations

import torch

from distill.config.choices import Amp
from distill.config.outside import LOSS
from distill.config.schema import JobConfig
from distill.job.blocks import Blocks
from distill.training.losses import refuse_unusable_loss

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
