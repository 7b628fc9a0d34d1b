"""Batch norms whose statistics are those of all ranks' rows: a network learns on several ranks what it learns on one.

Modules stay as they are: their calls are met on the way to PyTorch. Knows no process groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill.errors import DistillError

Gather = Callable[[Tensor], Tensor]  # a tensor of this rank -> those of all ranks, stacked, the same on all of them

_BATCH_NORM, _INSTANCE_NORM = inspect.signature(F.batch_norm), inspect.signature(F.instance_norm)


class SharedStatistics(TorchFunctionMode):
    """Inside, batch norms that normalise by a batch's own statistics (training mode) take those of all ranks' rows.

    To be entered around forward and backward pass by all ranks, which then call the same norms in the same order.
    Whatever calls F.batch_norm is met: the modules of PyTorch, and those of others that derive from them. What instance
    norms remember of a batch becomes that of all rows too.
    """

    def __init__(self, gather: Gather, network: nn.Module) -> None:
        super().__init__()
        self._gather = gather
        tensors = [*network.parameters(), *network.buffers()]
        self._numbers = {id(tensor): number for number, tensor in enumerate(tensors, start=1)}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            call = _arguments(_BATCH_NORM, args, kwargs)
            if call["training"]:
                return self._batch_norm(call)
        if func is F.instance_norm:
            call = _arguments(_INSTANCE_NORM, args, kwargs)
            result = func(*args, **kwargs)
            if call["use_input_stats"] and call["running_mean"] is not None:
                self._remember_all(call)
            return result
        return func(*args, **kwargs)

    def _batch_norm(self, call: Mapping[str, Any]) -> Tensor:
        inputs, running_mean, running_var = call["input"], call["running_mean"], call["running_var"]
        # The kernel of batch norms, whose variance divides by the count: 12 times as fast as var_mean on a CPU.
        own_mean, own_var = torch.batch_norm_update_stats(inputs.detach(), *_remembering(inputs), 0.0)
        means, variances, counts = self._of_all(call, own_mean, own_var, count=inputs.numel() // inputs.shape[1])
        total = int(counts.sum())
        if total < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {inputs.shape}")
        share = (counts / total)[:, None]
        mean = (share * means).sum(0)
        # From the spread of the means, not as E[x^2] - E[x]^2, which cancels where the mean is large.
        variance = (share * (variances + (means - mean).square())).sum(0)
        if running_mean is not None:
            _forget(running_mean, mean, call["momentum"])
            # As in PyTorch the variance that is remembered is the unbiased one; what normalises is not.
            _forget(running_var, variance * (total / (total - 1)), call["momentum"])
        found = _Found(mean, variance, total, call["eps"], self._gather)
        result: Tensor = _Normalised.apply(inputs, call["weight"], call["bias"], found)
        return result

    def _remember_all(self, call: Mapping[str, Any]) -> None:
        """Replace an instance norm's running statistics, means over this rank's rows, by the means over all rows."""
        running = call["running_mean"], call["running_var"]
        *of_all, counts = self._of_all(call, *running, count=len(call["input"]))
        for tensor, found in zip(running, of_all, strict=True):
            tensor.copy_(((counts / counts.sum())[:, None] * found).sum(0))

    def _of_all(self, call: Mapping[str, Any], a: Tensor, b: Tensor, *, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return all ranks' a, b (ranks, channels) and counts (ranks,), having seen that they are at the same layer."""
        number = self._numbers.get(id(call["running_mean"])) or self._numbers.get(id(call["weight"]), 0)
        found = self._gather(torch.cat([a, b, a.new_tensor([count, number])]))
        if (found[:, -1] != number).any():
            raise DistillError(
                "finetune: in one step the ranks went different ways through the network, which chooses its layers by "
                "more than torch's random numbers; set finetune.epochs=0, or go on with one rank"
            )
        return found[:, : len(a)], found[:, len(a) : -2], found[:, -2]


@dataclass(frozen=True)
class _Found:
    """A batch's statistics over all ranks: (channels,) each, and from how many values of a channel they are."""

    mean: Tensor
    variance: Tensor
    total: int
    eps: float
    gather: Gather


class _Normalised(torch.autograd.Function):
    """Batch norm by the mean and variance of all ranks' values, which depend on them in the backward pass.

    Source: Ioffe, Szegedy 2015, "Batch normalization", section 3 (arXiv:1502.03167); its sums over the batch are those
    over all ranks.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, found: _Found) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.found = found
        return F.batch_norm(inputs, found.mean, found.variance, weight, bias, training=False, eps=found.eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        found: _Found = ctx.found
        inverse = torch.rsqrt(found.variance + found.eps)
        scale = inverse if weight is None else inverse * weight
        half = inputs.dtype is torch.bfloat16
        # In bf16 the kernel of training, which takes this rank's means for those of all, and what that is wrong by; in
        # fp32, where it is slow, the gradient less what mean and variance owe to every value, on whichever rank.
        statistics = found.mean, found.variance, found.mean, inverse
        by_inputs, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, inputs, weight, *statistics, half, found.eps, [half, True, True]
        )
        # Summed over all ranks for the inputs alone. Weight and bias get this rank's share: whoever trains adds
        # those up.
        sums = torch.stack([by_bias, by_weight])
        means = found.gather(sums).sum(0) / found.total
        mean_gradient, mean_product = (means - sums * (inputs.shape[1] / inputs.numel()) if half else means).unbind()
        slope = scale * inverse * mean_product
        offset = scale * mean_gradient - slope * found.mean
        if half:
            by_inputs.sub_(_line(inputs, slope, offset))
        else:
            shape = [1, -1] + [1] * (inputs.dim() - 2)
            owed = torch.addcmul(offset.view(shape), inputs, slope.view(shape))
            by_inputs = owed.neg_().addcmul_(gradient, scale.view(shape))
        _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return by_inputs, by_weight if needs_weight else None, by_bias if needs_bias else None, None


def _line(inputs: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return slope * inputs + offset by channel, by the one kernel that does so in bf16 without a detour by fp32."""
    return F.batch_norm(inputs, torch.zeros_like(slope), torch.ones_like(slope), slope, offset, eps=0.0)


def _arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _remembering(inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return what statistics of the inputs would be remembered in. In fp32 it makes those of bf16 inputs fp32."""
    if inputs.dtype is not torch.bfloat16:
        return None, None
    return inputs.new_zeros(inputs.shape[1], dtype=torch.float32), inputs.new_zeros(
        inputs.shape[1], dtype=torch.float32
    )


@torch.no_grad()
def _forget(running: Tensor, new: Tensor, momentum: float) -> None:
    running.mul_(1 - momentum).add_(new, alpha=momentum)
