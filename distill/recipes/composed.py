"""Factors of a convolution computed as the one convolution that they amount to, for as long as they are trained.

The function and its weights stay: a dense kernel is made of the factors in every pass, and gradients go through it. In
bf16 one dense kernel is often faster than several thin ones; whoever trains finds out by timing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.recipes import factors, separable
from distill.recipes.separable import SeparableConv2d

_FORMS = {
    ("reduce", "expand"): factors.CHANNEL,
    ("vertical", "horizontal"): factors.SPATIAL,
    ("reduce", "core", "expand"): factors.TUCKER,
}


def composable(network: nn.Module, heard: Collection[str] = ()) -> list[nn.Module]:
    """Return the modules of a network that composed() can compute as one; those are left out in which a module with one
    of the paths `heard` has to run."""
    return [
        module
        for path, module in network.named_modules()
        if _parts(module) and not any(one.startswith(f"{path}.") for one in heard)
    ]


@contextmanager
def composed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each of these layers computes with one dense kernel."""
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _parts(module: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions in a row that a module consists of; none where it is something else."""
    named = dict(module.named_children())
    factored = type(module) is nn.Sequential and tuple(named) in _FORMS
    parts = [part for part in named.values() if isinstance(part, nn.Conv2d)]
    if not (factored or isinstance(module, SeparableConv2d)) or len(parts) < len(named):
        return []
    plain = all(part.padding_mode == "zeros" and not isinstance(part.padding, str) for part in parts)
    whole = all(part.groups == 1 for part in parts) or not factored
    return parts if plain and whole and all(part.bias is None for part in parts[:-1]) else []


def _forward(layer: nn.Module, x_BCHW: Tensor) -> Tensor:
    parts = _parts(layer)
    with torch.autocast(x_BCHW.device.type, enabled=False):  # the small product of factors is not rounded
        kernel = _kernel(layer, parts)
    # Each side of an image is worked on by one of the parts alone; the others have a stride of 1 and no padding there.
    stride, padding, dilation = (
        tuple(max(getattr(part, name)[side] for part in parts) for side in (0, 1))
        for name in ("stride", "padding", "dilation")
    )
    return F.conv2d(x_BCHW, kernel, parts[-1].bias, stride, padding, dilation)


def _kernel(layer: nn.Module, parts: Sequence[nn.Conv2d]) -> Tensor:
    """Return the kernel (D, C, k, l) that the parts amount to."""
    weights = [part.weight for part in parts]
    if isinstance(layer, SeparableConv2d):
        flat = separable.composed(weights[0].flatten(1), weights[1].flatten(1), layer.rank)
        inputs = parts[0].in_channels // layer.rank
    else:
        flat = factors.composed(_FORMS[tuple(name for name, _ in layer.named_children())], *weights)
        inputs = parts[0].in_channels
    sides = [max(part.kernel_size[side] for part in parts) for side in (0, 1)]
    return flat.reshape(parts[-1].out_channels, inputs, *sides)
