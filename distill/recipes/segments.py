"""An activation of several straight segments, light enough for a student: a slope and a bias each, for a whole layer.

Knows no blocks and no networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

SEGMENTS = 8  # a power of two, of which the lowest bits of a number are the remainder
REACH = 3.0  # standard deviations on both sides of the mean that segments share
MOMENTUM = 0.1  # of a batch in the moving deviation, as in batch norms
AT_A_TIME = 1 << 15  # values on a CPU: what is made of them stays in the caches
SEEN = 8  # places at least along both sides of an image, of the lattice on which its values are seen


class LightSegments(nn.Module):
    """Light multi-segment activation: of segments of equal width around the mean of what the layer gets, each has a
    slope and a bias. As it is made it is ReLU, whatever it gets.

    Source: Xu, Ke, Zhang, Bian, Liu 2020, "Light multi-segment activation for model compression", equations 3 and 4
    (arXiv:1907.06870): 8 segments within 3 standard deviations of the mean, the outer ones without end, parameters of
    a layer as a whole. We differ: the segments are moved by up to half of one, so that a border is zero, and ReLU met
    exactly; which border that is, the first batch says, and widths follow a moving deviation, in training as in use.
    Slopes are learnt as differences from ReLU's.
    """

    deviation: Tensor
    zero: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.zeros(SEGMENTS))
        self.biases = nn.Parameter(torch.zeros(SEGMENTS))
        self.register_buffer("deviation", torch.ones(()))
        self.register_buffer("zero", torch.tensor(SEGMENTS / 2))  # the number of the segment that begins at zero
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._see(x.detach())
        width = self.deviation * (2 * REACH / SEGMENTS)
        steps = torch.arange(SEGMENTS, device=x.device) >= self.zero
        return segmented(x, torch.stack([self.slopes + steps, self.biases]), width.reciprocal(), self.zero)

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        """Take a batch into the statistics; without a decision on the host, as a CUDA graph wants it."""
        x = _lattice(x)
        mean, variance = x.new_zeros(1, dtype=torch.float32), x.new_ones(1, dtype=torch.float32)
        # Whoever trains on several ranks makes the statistics of batch norms those of all rows, and so these.
        F.batch_norm(x.float().reshape(1, 1, -1), mean, variance, training=True, momentum=1.0)
        deviation = variance.sqrt().squeeze().clamp_min(torch.finfo(torch.float32).tiny)
        sound, first = deviation.isfinite(), self.batches == 0
        nearest = (SEGMENTS / 2 - mean.squeeze() / (deviation * (2 * REACH / SEGMENTS))).round()
        self.zero.copy_(torch.where(first & sound, nearest.clamp(1, SEGMENTS - 1), self.zero))
        moved = torch.lerp(self.deviation, deviation, torch.where(first, 1.0, MOMENTUM))
        self.deviation.copy_(torch.where(sound, moved, self.deviation))
        self.batches.add_(sound)


def segmented(x: Tensor, lines: Tensor, per_width: Tensor, zero: Tensor) -> Tensor:
    """Return slope * x + bias of the segment in which each value of `x` is, of any shape; `lines` are all slopes, and
    all biases (2, segments). Segment number `zero` begins at zero, and there are `per_width` to a unit."""
    if has_torch_function_unary(x):
        met: Tensor = handle_torch_function(segmented, (x,), x, lines, per_width, zero)
        return met
    if torch.compiler.is_compiling():  # also where a program is exported: operations alone, each of all values
        numbers = _numbers(_places(x, per_width, zero)).reshape(-1)
        slope, bias = (line.index_select(0, numbers).reshape(x.shape) for line in lines.to(x.dtype))
        exported: Tensor = slope * x + bias
        return exported
    result: Tensor = _Segmented.apply(x, lines, per_width, zero)
    return result


def _places(x: Tensor, per_width: Tensor, zero: Tensor) -> Tensor:
    """Return the number of the segment of each value, in the type of `x`."""
    # Rounded down before the shift: the least that is negative stays so.
    return (x * per_width).floor_().add_(zero).clamp_(0, SEGMENTS - 1)


def _numbers(places: Tensor) -> Tensor:
    """Return the numbers as int32. What is not a number has no segment, and must find one all the same."""
    return places.to(torch.int32).bitwise_and_(SEGMENTS - 1)


class _Segmented(torch.autograd.Function):
    """segmented() part by part, so that what is in between stays in a CPU's caches: several times as fast as by whole
    tensors. Gradients are sums in a fixed order, on every device. Those of slopes and biases, which a layer has one of
    for all its values, are estimated from the values that a lattice has of every image and channel: all of small ones.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lines: Tensor, per_width: Tensor, zero: Tensor) -> Tensor:
        x = _dense(x)
        (slope, bias), result = lines.to(x.dtype), torch.empty_like(x)
        for values, given in _parts(x, result):
            numbers = _numbers(_places(values, per_width, zero))
            torch.index_select(slope, 0, numbers, out=given)
            given.mul_(values).add_(bias.index_select(0, numbers))
        ctx.save_for_backward(x, lines, per_width, zero)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, lines, per_width, zero = ctx.saved_tensors
        gradient = gradient if gradient.stride() == x.stride() else torch.empty_like(x).copy_(gradient)
        slope, result = lines[0].to(x.dtype), torch.empty_like(x)
        for values, given, owed in _parts(x, gradient, result):
            torch.index_select(slope, 0, _numbers(_places(values, per_width, zero)), out=owed)
            owed.mul_(given)
        few = _lattice(x)
        by_lines = _sums(few, _lattice(gradient), per_width, zero) * (x.numel() / few.numel())
        return result, by_lines.to(lines.dtype), None, None


def _sums(x: Tensor, gradient: Tensor, per_width: Tensor, zero: Tensor) -> Tensor:
    """Return the sums over each segment of gradient * x and of the gradient (2, segments), in float64."""
    borders = torch.arange(SEGMENTS, device=x.device, dtype=torch.float32)[:, None]
    sums = torch.zeros(2, SEGMENTS, dtype=torch.float64, device=x.device)
    for values, given in _parts(x.float().contiguous(), gradient.float().contiguous()):
        # What lies above each border, as products with ones and zeros: faster than adding one by one.
        places = _places(values, per_width, zero)
        above = torch.ge(places, borders, out=places.new_empty(SEGMENTS, len(places)))
        sums += torch.stack([above @ (given * values), above @ given])
    return sums - F.pad(sums[:, 1:], (0, 1))


def _lattice(x: Tensor) -> Tensor:
    """Return the values of images (B, C, H, W) on a lattice; of what has no such form all."""
    if x.dim() != 4:
        return x
    step = max(1, min(x.shape[2:]) // SEEN)
    return x[:, :, ::step, ::step]


def _dense(x: Tensor) -> Tensor:
    """Return a tensor whose values lie in a row in memory, in whatever order."""
    return x if torch.empty_like(x).stride() == x.stride() else x.contiguous()


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the values of dense tensors of one form, part by part in the order of memory."""
    rows = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    size = AT_A_TIME if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(torch.split(row, size) for row in rows), strict=True)
