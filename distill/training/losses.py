"""Losses: of a block against the teacher's activation, and of a whole student against the teacher's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BlockLossFunction = Callable[[Tensor, Tensor], Tensor]


class _MeanSquare(torch.autograd.Function):
    """F.mse_loss in float32 whose gradient lies in memory as the student's output does: that of PyTorch's is always
    contiguous, and behind it every channels_last kernel up to the next convolution takes several times as long."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student.float() - teacher.float()
        ctx.save_for_backward(difference)
        ctx.dtype = student.dtype
        return difference.square().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (gradient * (2 / difference.numel()))).to(ctx.dtype), None


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error divided by the teacher's variance over the batch: 0 is perfect, 1 is the best constant.

    Shapes: both (batch, ...), equal. Returns a float32 scalar without unit. This is the normalised loss that is
    trained by default, because it makes blocks comparable, and the relative error that every report shows.
    """
    teacher = teacher.float()
    variance = teacher.var(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    return mean_squared_error(student, teacher) / variance


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error. Shapes: both (batch, ...), equal. Returns a float32 scalar in squared units."""
    error: Tensor = _MeanSquare.apply(student, teacher)
    return error


BLOCK_LOSSES: dict[str, BlockLossFunction] = {"normalized_mse": relative_error, "mse": mean_squared_error}


def soft_target_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy gap between softened predictions, scaled by the squared temperature.

    Shapes: both (batch, classes), logits. Returns nats: T^2 KL(softmax(teacher / T) || softmax(student / T)).
    Source: Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", section 2 (arXiv:1503.02531).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
