"""Thinner layers in a row in the place of one: how they are built, and the weights with which they begin.

The factors of a layer are the weights of those layers, in their order. Everything is float64 on the CPU, so that every
rank gets the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.profiling.flops import module_flops
from distill.profiling.sketch import Sketch
from distill.recipes.least_squares import TINY, Flow, balanced, iterations_for, matrix, minimised, regressed
from distill.recipes.plain import Layer
from distill.recipes.recipe import Cost
from distill.recipes.replacement import Replacing

CHANNEL, SPATIAL, TUCKER = FORMS = ("channel", "spatial", "tucker")


@dataclass(frozen=True, kw_only=True)
class Factors(Replacing):
    """Replaces one layer by factors of its kernel, of one form and of these ranks.

    channel: k x k to r channels, then 1 x 1 (also of linear layers). Source: Zhang, Zou, He, Sun 2015, "Accelerating
    very deep convolutional networks for classification and detection" (arXiv:1505.06798); the nearest to the outputs,
    as there, but what counts is what the batch norm behind lets through.
    spatial: k x 1 to r channels, then 1 x k. Source: Jaderberg, Vedaldi, Zisserman 2014, "Speeding up convolutional
    neural networks with low rank expansions", scheme 2 (arXiv:1405.3866).
    tucker: 1 x 1 to r1 channels, k x k to r2, then 1 x 1. Source: Kim, Park, Yoo, Choi, Yang, Shin 2016, "Compression
    of deep convolutional neural networks for fast and low power mobile applications" (arXiv:1511.06530).
    """

    form: str
    ranks: tuple[int, ...]
    init: str = "teacher"

    def build(self, layer: Layer) -> nn.Sequential:
        return nn.Sequential(OrderedDict(_parts(layer, self.form, self.ranks)))

    def cost_for(self, layer: Layer, shape: tuple[int, ...]) -> Cost:
        with torch.device("meta"):
            imagined, x = self.build(layer), torch.empty(shape)
        return Cost(sum(parameter.numel() for parameter in imagined.parameters()), module_flops(imagined, x))

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)

    def at_full_size(self, layer: Layer) -> nn.Sequential:
        full = Factors(form=self.form, ranks=full_ranks(layer, self.form))
        replacement = full.build(layer).to(layer.weight.device, layer.weight.dtype)
        _fill(replacement, layer, _trivial(layer.weight.detach(), self.form))
        return replacement

    def kernel_of(self, replacement: nn.Module) -> Tensor:
        return composed(self.form, *(_double(part.weight) for part in replacement.children()))

    def initialize(
        self, replacement: nn.Module, layer: Layer, generator: torch.Generator, flow: Flow | None = None
    ) -> None:
        if self.init == "random":
            factors = [_drawn(part, generator) for part in replacement.children()]
        else:
            factors = first_factors(_double(layer.weight), self.form, self.ranks, flow)
        _fill(replacement, layer, factors)


def full_ranks(layer: Layer, form: str) -> tuple[int, ...]:
    """Return the ranks with which factors of a form can be any kernel of the layer."""
    outputs, inputs, height, width = _sides(layer.weight)
    if form == SPATIAL:
        return (min(inputs * height, outputs * width),)
    last = min(outputs, inputs * height * width)
    return (inputs, last) if form == TUCKER else (last,)


def ranks_of_ratio(layer: Layer, form: str, ratio: float) -> tuple[float, ...]:
    """Return the ranks, not yet whole numbers, whose factors have that share of the layer's weights; of tucker's two,
    each is the same share of its channels."""
    outputs, inputs, height, width = _sides(layer.weight)
    taps = height * width
    weights = ratio * outputs * inputs * taps
    if form == SPATIAL:
        return (weights / (inputs * height + outputs * width),)
    if form == CHANNEL:
        return (weights / (inputs * taps + outputs),)
    # share^2 core + share outer = weights
    core, outer = outputs * inputs * taps, inputs**2 + outputs**2
    share = ((outer**2 + 4 * core * weights) ** 0.5 - outer) / (2 * core)
    return share * inputs, share * outputs


def ranks_of_energy(layer: Layer, form: str, energy: float) -> tuple[int, ...]:
    """Return the least ranks that keep that share of the kernel's squared singular values; for tucker on each side.

    They are the kernel's own: what flows into a layer is not known when sizes are chosen.
    """
    kernel = _double(layer.weight).reshape(_sides(layer.weight))
    if form == SPATIAL:
        unfolded = [_lines(kernel)]
    else:
        unfolded = [kernel.transpose(0, 1).flatten(1)] if form == TUCKER else []
        unfolded.append(kernel.flatten(1))
    kept = [torch.linalg.svdvals(one).square().cumsum(0) for one in unfolded]
    return tuple(min(int((one < energy * one[-1]).sum()) + 1, len(one)) for one in kept)


def composed(form: str, *factors: Tensor) -> Tensor:
    """Return the kernel (D, d) of the one layer that factors amount to."""
    if form == SPATIAL:
        vertical, horizontal = factors
        return torch.einsum("drj,rci->dcij", horizontal[:, :, 0], vertical[..., 0]).flatten(1)
    if form == TUCKER:
        reduce, core, expand = factors
        return torch.einsum("dr,rskl,sc->dckl", expand.flatten(1), core, reduce.flatten(1)).flatten(1)
    reduce, expand = factors
    return expand.flatten(1) @ reduce.flatten(1)


def first_factors(kernel: Tensor, form: str, ranks: Sequence[int], flow: Flow | None) -> list[Tensor]:
    """Return the factors of a kernel (D, C, k, k) or (D, C) that lose least of it, or of what it gives on the data.

    Exact in the channel form; in the others the best start (of the data too, for tucker), and L-BFGS from there.
    """
    if form == CHANNEL:
        expand, reduce = low_rank(kernel.flatten(1), ranks[0], flow)
        return [reduce, expand]
    start = _spatial(kernel, ranks[0], flow) if form == SPATIAL else _tucker(kernel, ranks, flow)
    if flow is None:
        return start
    wanted = kernel.flatten(1)
    return minimised(start, lambda *them: composed(form, *them), wanted, flow, iterations=iterations_for(wanted))


def low_rank(kernel: Tensor, rank: int, flow: Flow | None = None) -> tuple[Tensor, Tensor]:
    """Return (D, rank) and (rank, d), equally large, whose product is nearest to the kernel W (D, d); with a flow, in
    what counts of its outputs.

    With Y = S W, the rows U of the largest eigenvectors of Y Sigma Y^T give S^-1 U and U^T Y. Where there are more
    outputs than inputs, the same product comes from the smaller matrix: with Sigma = R R^T, the largest eigenvectors V
    of R^T Y^T Y R give S^-1 Y R V and V^T R^-1.
    """
    scaled = kernel if flow is None else flow.scale[:, None] * kernel
    if len(kernel) <= kernel.shape[1] or (flow is not None and isinstance(flow.covariance, Sketch)):
        gram = scaled @ scaled.T if flow is None else scaled @ flow.covariance @ scaled.T
        left = _largest(gram, rank)
        right = left.T @ scaled
    else:
        root, inverse = (None, None) if flow is None else _roots(flow.covariance)  # type: ignore[arg-type]
        seen = scaled if root is None else scaled @ root
        vectors = _largest(seen.T @ seen, rank)
        left = seen @ vectors
        right = vectors.T if inverse is None else vectors.T @ inverse
    if flow is not None:
        left = left / flow.scale[:, None]
    return balanced(left, right)


def _largest(gram: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors (n, rank) of a symmetric matrix with the largest eigenvalues, from the largest on."""
    vectors: Tensor = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors
    return vectors[:, -rank:].flip(1)


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return R with R R^T = covariance, and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp_min(TINY * values[-1].clamp_min(TINY)).sqrt()
    return vectors * root, (vectors / root).T


def _spatial(kernel: Tensor, rank: int, flow: Flow | None) -> list[Tensor]:
    """Return factors (r, C, k, 1) and (D, r, 1, k): the nearest, from the SVD of the unfolding (C k, D k); with a flow,
    the second as it is best behind the first."""
    outputs, inputs, height, width = kernel.shape
    left, right = low_rank(_lines(kernel), rank)
    if flow is not None:
        first, pixels = left.reshape(inputs, height, rank), torch.eye(width, dtype=left.dtype)
        features = torch.einsum("cir,jl->cijrl", first, pixels).reshape(-1, rank * width)
        second = regressed(kernel.flatten(1), features, flow).reshape(outputs, rank, width)
        left, right = balanced(left, second.transpose(0, 1).flatten(1))
    vertical = left.T.reshape(rank, inputs, height, 1)
    return [vertical, right.reshape(rank, outputs, width).transpose(0, 1).unsqueeze(2)]


def _lines(kernel: Tensor) -> Tensor:
    """Return a kernel (D, C, k, l) as (C k, D l)."""
    return kernel.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def _tucker(kernel: Tensor, ranks: Sequence[int], flow: Flow | None) -> list[Tensor]:
    """Return factors (r1, C, 1, 1), (r2, r1, k, k) and (D, r2, 1, 1): outputs are cut first, then inputs (De Lathauwer,
    De Moor, Vandewalle 2000, "A multilinear singular value decomposition", one side after the other)."""
    (inner, outer), inputs, taps = ranks, kernel.shape[1], kernel.shape[2:].numel()
    expand, rest = low_rank(kernel.flatten(1), outer, flow)
    by_input = rest.reshape(outer, inputs, taps).transpose(1, 2).reshape(outer * taps, inputs)
    core, reduce = low_rank(by_input, inner, None if flow is None else _of_channels(flow, inputs, len(by_input)))
    core = core.reshape(outer, taps, inner).transpose(1, 2)
    return [reduce[:, :, None, None], core.reshape(outer, inner, *kernel.shape[2:]), expand[:, :, None, None]]


def _of_channels(flow: Flow, inputs: int, rows: int) -> Flow:
    """Return what is known of the input's channels, whatever the pixel of the kernel, for a kernel of so many rows."""
    taps = len(flow.mean) // inputs
    mean = flow.mean.reshape(inputs, taps).mean(1)
    if isinstance(flow.covariance, Sketch):
        factors, rest = flow.covariance.factors.reshape(inputs, -1), flow.covariance.rest.reshape(inputs, taps).sum(1)
        summed = factors @ factors.T + torch.diag(rest)
    else:
        summed = torch.einsum("ctdt->cd", flow.covariance.reshape(inputs, taps, inputs, taps))
    return Flow(mean, summed / taps, torch.ones(rows, dtype=torch.float64))


def _trivial(kernel: Tensor, form: str) -> list[Tensor]:
    """Return factors of full rank that need no arithmetic: the kernel itself, beside ones and zeros."""

    def eye(size: int) -> Tensor:
        return torch.eye(size, dtype=kernel.dtype, device=kernel.device)

    outputs, inputs, _, width = _sides(kernel)
    if form == SPATIAL:
        unfolded = _lines(kernel)
        few = len(unfolded) <= unfolded.shape[1]
        left, right = (eye(len(unfolded)), unfolded) if few else (unfolded, eye(unfolded.shape[1]))
        return [left.T, right.reshape(-1, outputs, width).transpose(0, 1)]
    flat = kernel.flatten(1)
    last, rest = (eye(outputs), flat) if outputs <= flat.shape[1] else (flat, eye(flat.shape[1]))
    return [eye(inputs), rest, last] if form == TUCKER else [rest, last]


@torch.no_grad()
def _fill(replacement: nn.Module, layer: Layer, factors: Sequence[Tensor]) -> None:
    parts = list(replacement.children())
    for part, factor in zip(parts, factors, strict=True):
        assert isinstance(part, nn.Conv2d | nn.Linear)
        part.weight.copy_(factor.reshape(part.weight.shape))
    if layer.bias is not None:
        parts[-1].bias.copy_(layer.bias)  # type: ignore[operator]


def _drawn(part: Any, generator: torch.Generator) -> Tensor:
    """Return random weights (He et al. 2015) of a part; an activation, if any, comes behind the last alone."""
    drawn = torch.empty(part.weight.shape)
    return nn.init.kaiming_normal_(drawn, mode="fan_in", nonlinearity="linear", generator=generator)


def _double(weight: Any) -> Tensor:
    return matrix(weight).reshape(weight.shape)


def _sides(weight: Tensor) -> tuple[int, int, int, int]:
    outputs, inputs, height, width = (*weight.shape, 1, 1)[:4]
    return outputs, inputs, height, width


def _parts(layer: Layer, form: str, ranks: Sequence[int]) -> dict[str, nn.Module]:
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        reduce = nn.Linear(layer.in_features, ranks[0], bias=False)
        return {"reduce": reduce, "expand": nn.Linear(ranks[0], layer.out_features, bias=has_bias)}
    inputs, outputs, rank = layer.in_channels, layer.out_channels, ranks[-1]
    if form == SPATIAL:
        vertical = nn.Conv2d(inputs, rank, bias=False, **_along(layer, 0))
        return {"vertical": vertical, "horizontal": nn.Conv2d(rank, outputs, bias=has_bias, **_along(layer, 1))}
    parts: dict[str, nn.Module] = {}
    if form == TUCKER:
        inputs = ranks[0]
        parts["reduce"] = nn.Conv2d(layer.in_channels, inputs, 1, bias=False)
    parts["core" if form == TUCKER else "reduce"] = nn.Conv2d(inputs, rank, bias=False, **_settings(layer))
    parts["expand"] = nn.Conv2d(rank, outputs, 1, bias=has_bias)
    return parts


def _settings(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def _along(conv: nn.Conv2d, dim: int) -> dict[str, Any]:
    """Return the settings of the part of a convolution that works along one dimension, 0 or 1, of an image."""
    others = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    settings = _settings(conv)
    for name, other in others.items():
        if not isinstance(settings[name], str):
            settings[name] = tuple(value if at == dim else other for at, value in enumerate(settings[name]))
    return settings
