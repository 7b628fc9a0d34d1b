"""Losses: of a block against the teacher's activation, and of a whole student against the teacher's logits.

A block loss takes the student's activation and the teacher's, the target. One from outside is named by
distill.loss=package.module:function:

    def huber(student, target):
        error = (student.float() - target.float()) / target.float().std()
        return torch.where(error.abs() < 1, 0.5 * error.square(), error.abs() - 0.5).mean()

Both have the shape (batch, ...) of the block's boundary. With distill.amp=bf16 the student's is bfloat16, hence the
float(). It returns a scalar tensor by differentiable operations, a mean over the batch: where ranks share a batch,
their means are averaged. On CUDA it becomes part of a CUDA graph, in which nothing is read back or printed (.item(),
branches by value) and nothing copied from the host; what cannot be captured runs uncaptured, and the log says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import ConfigError
from distill.extensions import named, reason

BlockLoss = Callable[[Tensor, Tensor], Tensor]


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
    # A constant target has no variance: without the floor a perfect student's error would be NaN, and end the block.
    variance = teacher.var(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    return mean_squared_error(student, teacher) / variance


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error. Shapes: both (batch, ...), equal. Returns a float32 scalar in squared units."""
    error: Tensor = _MeanSquare.apply(student, teacher)
    return error


BLOCK_LOSSES: dict[str, BlockLoss] = {"normalized_mse": relative_error, "mse": mean_squared_error}


def block_loss(name: str) -> BlockLoss:
    """Return the block loss that distill.loss names. Raises ConfigError on it where there is none."""
    found = named("distill.loss", name, BLOCK_LOSSES, "distill.losses")
    if not callable(found):
        raise ConfigError("distill.loss", name, f"a function of two tensors, not {type(found)}")
    return found


def refuse_unusable_loss(name: str, student: Tensor, target: Tensor) -> None:
    """Raise ConfigError on distill.loss unless that loss can train: a scalar that the student's activation decides."""
    student = student.detach().requires_grad_()
    try:
        value = block_loss(name)(student, target)
    except ConfigError:
        raise
    except Exception as error:  # whatever stands in the user's function
        wanted = f"a function of two tensors of {tuple(student.shape)}, {student.dtype} and {target.dtype}"
        raise ConfigError("distill.loss", name, f"{wanted} ({reason(error)})") from error
    refuse_no_loss("distill.loss", name, value)
    if torch.autograd.grad(value, student, allow_unused=True)[0] is None:
        raise ConfigError("distill.loss", name, "a loss that depends on the student's activation, its first argument")


def refuse_no_loss(setting: str, name: str, value: object) -> None:
    """Raise ConfigError on `setting` unless its function, called `name`, gave a scalar that gradients can be had of."""
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dim() > 0:
        got = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(setting, name, f"a scalar tensor as the loss, such as a mean; it returns {got}")
    if not value.requires_grad:
        allowed = "a loss with a gradient: it detaches the student's output, or works under no_grad or in other types"
        raise ConfigError(setting, name, allowed)


def soft_target_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy gap between softened predictions, scaled by the squared temperature.

    Shapes: both (batch, classes), logits. Returns nats: T^2 KL(softmax(teacher / T) || softmax(student / T)).
    Source: Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", section 2 (arXiv:1503.02531).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
