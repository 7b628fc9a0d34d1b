"""How a unit's weights change: its options, its optimizer, its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How every block is trained; the meanings are those of the section `distill` of the configuration."""

    loss: str = "normalized_mse"
    optimizer: str = "adam"
    lr: float = 3e-3
    momentum: float = 0.9
    smoothing: float = 0.99
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    clip_norm: float | None = None
    amp: str = "off"
    patience: int = 0  # looks without improvement after which a block stops; 0: only at its budget
    min_delta: float = 0.0
    log_every: int = 20


def learning_rate(step: int, *, budget: int, options: TrainerOptions) -> float:
    """Return the rate of step `step` (0-based): linear warm-up, then constant or half a cosine down to zero.

    Source of the cosine: Loshchilov, Hutter 2017, "SGDR", equation 5, without restarts (arXiv:1608.03983).
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    share = (step - options.warmup_steps) / max(1, budget - options.warmup_steps)
    return options.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def make_optimizer(module: nn.Module, options: TrainerOptions, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of a block, with PyTorch's fused update where it has one; on CUDA its learning rate lies on
    the device, where a captured update reads it."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    lr = torch.tensor(options.lr, device=device) if device.type == "cuda" else options.lr
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=options.weight_decay, fused=True)
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=True
        )
    optimizer = torch.optim.RMSprop(
        parameters,
        lr=lr,
        alpha=options.smoothing,
        weight_decay=options.weight_decay,
        capturable=device.type == "cuda",  # from the start: else it counts its steps on the CPU, where no graph can
    )
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are, by intent
    return optimizer
