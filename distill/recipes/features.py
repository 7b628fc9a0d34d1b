"""First weights of what a block's student computes before its last layer: features like the teacher's.

The student's layers are a pointwise convolution, a batch norm, a ReLU, a larger convolution (dense or depthwise) and a
batch norm. Where the teacher's block begins alike, they are its channels that weigh most. Where it begins with one
dense convolution W, they are a factorisation of that: its best channel mixes and filters for these, the ReLU between
being shifted so far that it lets most through. Random weights stay where the student has more channels than these.
Everything is float64 on the CPU, so that every rank gets the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.least_squares import matrix
from distill.recipes.routes import Layer, Routes

SHIFT = 2.0  # standard deviations by which the ReLU between two factors is passed


@dataclass(frozen=True)
class Features:
    """The student's layers up to its features."""

    reduce: nn.Conv2d
    norm1: nn.BatchNorm2d
    spatial: nn.Conv2d
    norm2: nn.BatchNorm2d

    @property
    def depthwise(self) -> bool:
        return self.spatial.groups > 1

    @property
    def side(self) -> int:
        return self.spatial.kernel_size[0]


def adopt_features(student: Features, routes: Routes, statistics: InputStatistics | None) -> None:
    """Start the student's features from the teacher's; `statistics` are of the inputs of the branch's first layer."""
    if not routes.branch:
        return
    first, *behind = routes.branch
    if behind and (not student.depthwise or behind[0].conv.groups > 1):
        _adopt_channels(student, first, behind[0])
    elif behind:
        kernel = torch.einsum("dmkl,mc->dckl", behind[0].kernel, first.kernel.flatten(1))
        _adopt_factors(student, _Kernel(kernel, behind[0].means_of_norm))
    elif statistics is None:
        _adopt_factors(student, _Kernel(first.kernel, first.means_of_norm))
    else:
        means = first.means(statistics.mean)
        _adopt_factors(student, _Kernel(first.kernel, means, statistics.mean, statistics.covariance))


@dataclass(frozen=True)
class _Kernel:
    """A dense kernel (D, C, k, k), the `means` (D) of what it is to give, and of its unfolded inputs the mean (d) and
    the covariance (d, d) if they are known; if not, they count as white."""

    weight: Tensor
    means: Tensor
    mean: Tensor | None = None
    covariance: Tensor | None = None

    def products(self, rows: Tensor) -> Tensor:
        """Return the covariance of what kernels (n, C, k, k) give."""
        flat = rows.flatten(1)
        return flat @ (flat.T if self.covariance is None else self.covariance @ flat.T)

    def pointwise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and the variances of what pointwise kernels (n, C) give."""
        if self.mean is None or self.covariance is None:
            return torch.zeros(len(rows), dtype=rows.dtype), rows.square().sum(1)
        channels, height, width = self.weight.shape[1:]
        at = torch.arange(channels) * height * width + (height // 2) * width + width // 2
        return rows @ self.mean[at], ((rows @ self.covariance[at][:, at]) * rows).sum(1)


def _adopt_factors(student: Features, kernel: _Kernel) -> None:
    cut = _resized(kernel.weight, student.side)
    width = student.reduce.out_channels
    rows, filters, of = _components(cut, width) if student.depthwise else _folded(cut, width, kernel)
    # A factorisation's signs are arbitrary; with these the ReLU between lets most through of inputs that have a mean.
    sign = torch.where(kernel.pointwise(rows)[0] + 1e-9 * rows.sum(1) < 0, -1.0, 1.0).double()
    rows = sign[:, None] * rows
    filters = filters * (sign[:, None, None, None] if student.depthwise else sign[:, None, None])
    mean, variance = kernel.pointwise(rows)
    shift = torch.maximum(mean, SHIFT * variance.sqrt())
    _put(student.reduce.weight, rows[:, :, None, None])
    _set_norm(student.norm1, mean, variance, shift)
    _put(student.spatial.weight, filters)
    if student.depthwise:
        whole, passed = rows[:, :, None, None] * filters, filters.sum((1, 2, 3)) * shift
    else:
        whole, passed = torch.einsum("nmkl,mc->nckl", filters, rows), filters.sum((2, 3)) @ shift
    variance = kernel.products(_resized(whole, *kernel.weight.shape[2:])).diagonal()
    _set_norm(student.norm2, passed, variance, kernel.means[of])


def _folded(kernel: Tensor, width: int, known: _Kernel) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best channel mixes (m, C) of a kernel, its filters (n, m, k, k) that give most, folded onto these, and
    which those are."""
    channels = kernel.transpose(0, 1).flatten(1)
    basis = torch.linalg.eigh(channels @ channels.T).eigenvectors.flip(1)[:, :width]
    of = spread(known.products(known.weight), width)
    return basis.T, torch.einsum("nckl,cm->nmkl", kernel[of], basis), of


def _components(kernel: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest rank-one components of a kernel's filters: channel mixes (m, C), filters (m, 1, k, k), and of
    which output each is."""
    u, s, vh = torch.linalg.svd(kernel.flatten(2), full_matrices=False)  # (D, C, q), (D, q), (D, q, k k)
    order = s.flatten().argsort(descending=True, stable=True)[:width]
    of, which = order // s.shape[1], order % s.shape[1]
    filters = s[of, which][:, None] * vh[of, which]
    return u[of, :, which], filters.view(-1, 1, *kernel.shape[2:]), of


def _adopt_channels(student: Features, first: Layer, second: Layer) -> None:
    """Take over the channels between two layers of the teacher that weigh most, and of what the second gives, that
    which explains most."""
    width = student.reduce.out_channels
    weights = second.kernel
    if second.conv.groups == 1:
        top = _largest(_gains(first) * weights.square().sum((0, 2, 3)), width)
        of = spread(weights[:, top].flatten(1) @ weights[:, top].flatten(1).T, width)
        filters = second.conv.weight[of][:, top]
    elif len(weights) == second.conv.groups:
        top = of = _largest(_gains(first) * weights.square().sum((1, 2, 3)), width)
        filters = second.conv.weight[of]
        if not student.depthwise:
            filters = torch.diag_embed(filters[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1)
    else:
        return
    _put(student.reduce.weight, first.conv.weight[top])
    take_norm(student.norm1, first, top)
    _put(student.spatial.weight, _resized(filters, student.side))
    take_norm(student.norm2, second, of)


def _gains(layer: Layer) -> Tensor:
    """Return the variance with which each channel of a layer enters what is behind it."""
    return matrix(layer.conv.weight).square().sum(1) if layer.norm is None else matrix(layer.norm.weight)[:, 0].square()


def _largest(values: Tensor, count: int) -> Tensor:
    return values.argsort(descending=True, stable=True)[:count].sort().values


def spread(products: Tensor, count: int) -> Tensor:
    """Return the rows of a covariance (n, n) that, one after another, explain most of what those before leave: Cholesky
    with pivoting."""
    rest, chosen = products.clone(), []
    for _ in range(min(count, len(rest))):
        best = int(rest.diagonal().argmax())
        chosen.append(best)
        pivot = rest[best, best].clamp_min(torch.finfo(rest.dtype).tiny)
        rest = rest - torch.outer(rest[:, best], rest[best]) / pivot
        rest[best, :] = rest[:, best] = 0
        rest[best, best] = -1  # not again
    return torch.tensor(chosen)


def take_norm(norm: nn.Module, layer: Layer, of: Tensor | None = None) -> None:
    """Give a batch norm what stands behind the outputs `of` (None: all) of a layer, its bias included."""
    assert isinstance(norm, nn.BatchNorm2d)
    bias = torch.zeros(layer.conv.out_channels) if layer.conv.bias is None else layer.conv.bias.cpu()
    chosen = slice(None) if of is None else of
    if layer.norm is None:
        _set_norm(norm, torch.zeros_like(bias)[chosen], torch.ones_like(bias)[chosen], bias[chosen])
        return
    assert layer.norm.running_mean is not None
    assert layer.norm.running_var is not None
    mean, variance = layer.norm.running_mean.cpu()[chosen], layer.norm.running_var.cpu()[chosen]
    scale = layer.norm.weight.cpu()[chosen] / (variance + layer.norm.eps).sqrt()
    _set_norm(norm, mean - bias[chosen], variance, layer.norm.bias.cpu()[chosen], scale)


def _set_norm(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, bias: Tensor, scale: Tensor | float = 1.0) -> None:
    """Let the first channels of a batch norm give scale * (x - mean) + bias, for x said to have that variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    for tensor, values in (
        (norm.running_mean, mean),
        (norm.running_var, variance),
        (norm.weight, scale * (variance + norm.eps).sqrt()),
        (norm.bias, bias),
    ):
        tensor[: len(values)].copy_(values)


def _put(weight: Tensor, values: Tensor) -> None:
    """Write values into the first outputs and the first inputs of a weight."""
    weight[: len(values), : values.shape[1]].copy_(values)


def _resized(kernel: Tensor, height: int, width: int | None = None) -> Tensor:
    """Return kernels of that size: their middle, or zeros around them."""
    down, right = (size - have for size, have in zip((height, width or height), kernel.shape[2:], strict=True))
    return F.pad(kernel, (right // 2, right - right // 2, down // 2, down - down // 2))
