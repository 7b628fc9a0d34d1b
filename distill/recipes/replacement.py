"""What replaces one dense convolution, whatever block it is in, and how replacements get into a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill.blocks.chain import switch_off_in_place
from distill.profiling.flops import module_flops
from distill.profiling.statistics import InputStatistics
from distill.recipes.least_squares import Flow, keep_mean, matrix, norm_of, rebase
from distill.recipes.plain import plain_form
from distill.recipes.recipe import Cost


class Replacing(ABC):
    """A way to replace one convolution."""

    needs_output: ClassVar[bool] = False  # whether a backward pass reads the output, which layers behind must leave

    @abstractmethod
    def build(self, conv: nn.Conv2d) -> nn.Module:
        """Return the replacement of `conv` with the same input and output shapes, its weights not yet meaningful."""

    @abstractmethod
    def predict(self, conv: nn.Conv2d, pixels: int) -> Cost:
        """Return what the replacement of `conv` costs where the output has so many pixels, without building it."""

    def at_full_size(self, conv: nn.Conv2d) -> nn.Module | None:
        """Return a replacement of `conv`, weights and all, that gives exactly what it gives; None where the recipe has
        none."""
        return None

    @abstractmethod
    def initialize(
        self,
        replacement: nn.Module,
        conv: nn.Conv2d,
        generator: torch.Generator,
        flow: Flow | None = None,
    ) -> None:
        """Give the replacement its first weights; every random number comes from the generator. `flow` is what is known
        of the convolution's input, where the recipe wants() that."""

    def kernel_of(self, replacement: nn.Module) -> Tensor | None:
        """Return the weight (D, ...) of the one convolution that the replacement amounts to, float64 on the CPU; None
        where it is not linear, or not known."""
        return None

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` is what this recipe is for: a dense convolution with a kernel larger than one pixel."""
        return isinstance(module, nn.Conv2d) and module.groups == 1 and max(module.kernel_size) > 1

    def compared(self, conv: nn.Conv2d, shape: tuple[int, ...]) -> tuple[Cost, Cost]:
        """Return the cost of `conv` on an input of that shape (1, channels, height, width), and of its replacement."""
        flops = module_flops(conv, torch.empty(shape, device="meta"))
        height, width = conv.kernel_size
        pixels = flops // (2 * height * width * conv.in_channels * conv.out_channels)
        return Cost(sum(p.numel() for p in conv.parameters()), flops), self.predict(conv, pixels)


def replace_convolutions(
    network: nn.Module,
    paths: Iterable[str],
    recipe: Replacing,
    generator: torch.Generator | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> None:
    """Put the recipe's replacements in the place of the convolutions at `paths`, in the order given; at all places,
    where the network has one of them at several.

    With a generator they get their first weights from the convolution they replace; without one they are left for a
    state dict to fill. Layers of the network that work in place stop doing so where the recipe needs that.
    """
    if recipe.needs_output:
        switch_off_in_place(network)
    for path in paths:
        conv = network.get_submodule(path)
        assert isinstance(conv, nn.Conv2d), path
        form = plain_form(conv)
        replacement = recipe.build(form.conv)
        if generator is not None:
            known = (statistics or {}).get(path)
            norm = None if known is None else norm_of(network, known)
            flow = None if known is None else Flow.of(known, matrix(form.conv.weight), norm)
            recipe.initialize(replacement, form.conv, generator, flow)
            _keep_mean_and_scale(recipe, replacement, form.conv, flow, norm)
        if form.pad is not None:
            replacement = nn.Sequential(OrderedDict(pad=form.pad, conv=replacement))
        replacement.train(conv.training)
        # Only after the first weights: they are drawn where the generator is, on the CPU, the same bits for every
        # device.
        replacement.to(form.conv.weight.device, form.conv.weight.dtype)
        for place in [other for other, module in network.named_modules(remove_duplicate=False) if module is conv]:
            network.set_submodule(place, replacement)


def _keep_mean_and_scale(
    recipe: Replacing, replacement: nn.Module, conv: nn.Conv2d, flow: Flow | None, norm: nn.Module | None
) -> None:
    """Let outputs keep their mean, and their scale behind a batch norm, as far as the replacement is known."""
    kernel = None if flow is None else recipe.kernel_of(replacement)
    if flow is None or kernel is None:
        return
    if norm is None:
        keep_mean(replacement, flow, matrix(conv.weight), matrix(kernel))
    else:
        rebase(norm, flow, matrix(conv.weight), matrix(kernel), conv.bias)
