"""The separable recipe: depthwise filters, then a pointwise convolution, started from the teacher's kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.recipes.convolutions import ConvolutionRecipe
from distill.recipes.least_squares import Flow, balanced, iterations_for, matrix, minimised, regressed
from distill.recipes.recipe import INIT, Cost, count, option


class SeparableConv2d(nn.Module):
    """`rank` depthwise filters per input channel, then a 1 x 1 convolution: rank (k^2 C + C D) weights for k^2 C D.

    The input is repeated `rank` times along the channels so that every depthwise filter has one channel of its own:
    the CPU kernels know that case, and only that one, as depthwise (2x faster than a channel multiplier).
    """

    def __init__(self, conv: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.rank = rank
        channels = conv.in_channels * rank
        self.depthwise = nn.Conv2d(
            channels,
            channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=channels,
            bias=False,
            padding_mode=conv.padding_mode,
        )
        self.pointwise = nn.Conv2d(channels, conv.out_channels, 1, bias=conv.bias is not None)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        repeated = torch.cat([x_BCHW] * self.rank, dim=1) if self.rank > 1 else x_BCHW
        result: Tensor = self.pointwise(self.depthwise(repeated))
        return result

    def as_branches(self, norm: nn.Module | None = None) -> Branches:
        """Return the same function, with the batch norm behind it if one is given (a foldable() one), as a sum of
        `rank` pairs of layers, with copies of the weights; in eval mode."""
        return Branches(self, norm)


class Branches(nn.Module):
    """What a SeparableConv2d computes, as a sum over its filters: no input is repeated, which can be faster."""

    def __init__(self, layer: SeparableConv2d, norm: nn.Module | None = None) -> None:
        super().__init__()
        depthwise, bias = layer.depthwise.weight.detach().chunk(layer.rank), layer.pointwise.bias
        whole = layer.pointwise.weight.detach()
        if norm is not None:
            whole, bias = _with_norm(whole, bias, norm)
        pointwise = whole.chunk(layer.rank, dim=1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                _with_weights(layer.depthwise, filters, groups=len(filters)),
                _with_weights(layer.pointwise, weights, bias=bias if number == 0 else None),
            )
            for number, (filters, weights) in enumerate(zip(depthwise, pointwise, strict=True))
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first, *others = self.branches
        result: Tensor = first(x_BCHW)
        for branch in others:
            result = result + branch(x_BCHW)
        return result


def foldable(norm: nn.Module) -> bool:
    """Whether a module is a batch norm that, in eval mode, a linear layer before it can take in."""
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.affine


def _with_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a convolution's weight (D, ...) and bias with the batch norm behind it."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    before = -norm.running_mean if bias is None else bias.detach() - norm.running_mean
    return weight * scale[:, None, None, None], norm.bias.detach() + before * scale


def _with_weights(like: nn.Conv2d, weights: Tensor, *, groups: int = 1, bias: Tensor | None = None) -> nn.Conv2d:
    """Return a convolution with these weights that moves over its input as another one does."""
    same = {name: getattr(like, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    outputs, inputs, height, width = weights.shape
    conv = nn.Conv2d(inputs * groups, outputs, (height, width), groups=groups, bias=bias is not None, **same)
    conv.weight.data = weights.clone()
    if bias is not None and conv.bias is not None:
        conv.bias.data = bias.detach().clone()
    return conv.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Separable(ConvolutionRecipe):
    """Depthwise then pointwise, started from the SVD of the teacher's kernel or at random (He et al. 2015)."""

    rank: int = option(2, "depthwise filters per input channel, at most as many as the kernel has pixels", count)
    init: str = option("data", "first weights: data (what flows into it), teacher (its kernel alone) or random", INIT)

    def build(self, conv: nn.Conv2d) -> SeparableConv2d:
        height, width = conv.kernel_size
        return SeparableConv2d(conv, min(self.rank, height * width))

    def predict(self, conv: nn.Conv2d, pixels: int) -> Cost:
        height, width = conv.kernel_size
        channels = conv.in_channels * min(self.rank, height * width)
        weights = channels * (height * width + conv.out_channels)
        return Cost(weights + (conv.out_channels if conv.bias is not None else 0), 2 * weights * pixels)

    def at_full_size(self, conv: nn.Conv2d) -> SeparableConv2d:
        height, width = conv.kernel_size
        full = Separable(rank=height * width, init="teacher")
        replacement = full.build(conv).to(conv.weight.device, conv.weight.dtype)
        full.initialize(replacement, conv, torch.Generator())
        return replacement

    def kernel_of(self, replacement: nn.Module) -> Tensor:
        assert isinstance(replacement, SeparableConv2d)
        return composed(matrix(replacement.depthwise.weight), matrix(replacement.pointwise.weight), replacement.rank)

    def initialize(
        self,
        replacement: nn.Module,
        conv: nn.Conv2d,
        generator: torch.Generator,
        flow: Flow | None = None,
    ) -> None:
        assert isinstance(replacement, SeparableConv2d)
        if self.init != "random":
            depthwise, pointwise = decouple(conv.weight.detach(), replacement.rank)
            if flow is not None:
                depthwise, pointwise = fitted(conv.weight, depthwise, flow)
            with torch.no_grad():
                replacement.depthwise.weight.copy_(depthwise)
                replacement.pointwise.weight.copy_(pointwise)
        else:
            for layer in (replacement.depthwise, replacement.pointwise):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        if conv.bias is not None and replacement.pointwise.bias is not None:
            with torch.no_grad():
                replacement.pointwise.bias.copy_(conv.bias)


def decouple(kernel_DCKK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best depthwise-then-pointwise pair of a dense kernel, by one SVD per input channel.

    Shapes: kernel (D out, C in, k, k); returns depthwise (rank C, 1, k, k) and pointwise (D, rank C, 1, 1), where
    filter r of channel c is at r C + c. Exact for rank = min(D, k^2); otherwise the nearest in the Frobenius norm.
    Source: Guo, Li, Lin, Cheng, Li 2018, "Network decoupling: from regular to depthwise separable convolutions",
    theorem 1 (arXiv:1808.05517). Computed in float64 on the CPU, so that every rank gets the same bits.
    """
    out_channels, in_channels, height, width = kernel_DCKK.shape
    per_channel = kernel_DCKK.detach().cpu().double().permute(1, 0, 2, 3).reshape(in_channels, out_channels, -1)
    u, s, vh = torch.linalg.svd(per_channel, full_matrices=False)  # (C, D, m), (C, m), (C, m, k k)
    missing = rank - s.shape[1]
    if missing > 0:  # fewer outputs than filters asked for: the rest stays zero
        u = torch.nn.functional.pad(u, (0, missing))
        s = torch.nn.functional.pad(s, (0, missing))
        vh = torch.nn.functional.pad(vh, (0, 0, 0, missing))
    root = s[:, :rank].sqrt()
    depthwise = (root[:, :, None] * vh[:, :rank]).permute(1, 0, 2).reshape(rank * in_channels, 1, height, width)
    pointwise = (u[:, :, :rank] * root[:, None, :]).permute(1, 2, 0).reshape(out_channels, rank * in_channels, 1, 1)
    return depthwise.to(kernel_DCKK), pointwise.to(kernel_DCKK)


def composed(depthwise: Tensor, pointwise: Tensor, rank: int) -> Tensor:
    """Return the kernel (D, C k k) of a depthwise (rank C, k k) and a pointwise (D, rank C) layer in a row."""
    per_filter = depthwise.reshape(rank, -1, depthwise.shape[1])
    weights = pointwise.reshape(len(pointwise), rank, -1)
    return torch.einsum("rck,drc->dck", per_filter, weights).flatten(1)


def fitted(kernel: Tensor, depthwise: Tensor, flow: Flow) -> tuple[Tensor, Tensor]:
    """Return a pair that loses little of what the dense kernel gives on the data, in the shapes of decouple().

    It is the best pointwise layer behind the filters given, and L-BFGS from there as far as that is quick.
    """
    wanted, filters, (outputs, inputs) = matrix(kernel), matrix(depthwise), kernel.shape[:2]
    rank = len(filters) // inputs
    channels = torch.eye(inputs, dtype=filters.dtype)
    features = torch.einsum("rck,ce->ckre", filters.reshape(rank, inputs, -1), channels).reshape(-1, len(filters))
    weights, filters = balanced(regressed(wanted, features, flow), filters)
    found = minimised(
        [filters, weights], lambda d, p: composed(d, p, rank), wanted, flow, iterations=iterations_for(wanted)
    )
    return found[0].reshape(depthwise.shape), found[1].reshape(outputs, -1, 1, 1)
