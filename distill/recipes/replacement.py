"""What replaces one dense convolution or linear layer, whatever block it is in; how replacements get into a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.blocks.chain import switch_off_in_place
from distill.profiling.flops import module_flops
from distill.profiling.statistics import InputStatistics
from distill.recipes.least_squares import Flow, keep_mean, matrix, norm_of, rebase
from distill.recipes.plain import Layer, plain_form
from distill.recipes.recipe import Cost


class Replacing(ABC):
    """A way to replace one layer: a dense convolution, of which most know nothing else, or a linear layer."""

    needs_output: ClassVar[bool] = False  # whether a backward pass reads the output, which layers behind must leave

    @abstractmethod
    def build(self, conv: Any) -> nn.Module:
        """Return the replacement of `conv` with the same input and output shapes, its weights not yet meaningful."""

    def predict(self, conv: Any, pixels: int) -> Cost:
        """Return what the replacement of `conv` costs where the output has so many pixels, without building it. Not
        needed of a recipe that has cost_for()."""
        raise NotImplementedError(f"{type(self).__name__} says what no replacement costs")

    def cost_for(self, layer: Any, shape: tuple[int, ...]) -> Cost:
        """Return what the replacement of `layer` costs for one input of that shape; by default it is predict() by the
        output's pixels (by rows, for a linear layer)."""
        return self.predict(layer, _flops(layer, shape) // (2 * layer.weight.numel()))

    def at_full_size(self, conv: Any) -> nn.Module | None:
        """Return a replacement of `conv`, weights and all, that gives exactly what it gives; None where the recipe has
        none."""
        return None

    @abstractmethod
    def initialize(
        self,
        replacement: nn.Module,
        conv: Any,
        generator: torch.Generator,
        flow: Flow | None = None,
    ) -> None:
        """Give the replacement its first weights; every random number comes from the generator. `flow` is what is known
        of the layer's input, where the recipe wants() that."""

    def kernel_of(self, replacement: nn.Module) -> Tensor | None:
        """Return the weight (D, ...) of the one layer that the replacement amounts to, float64 on the CPU; None where
        it is not linear, or not known."""
        return None

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` is what this recipe is for: a dense convolution with a kernel larger than one pixel."""
        return isinstance(module, nn.Conv2d) and module.groups == 1 and max(module.kernel_size) > 1

    def sized(self, layer: Layer) -> Replacing:
        """Return the way to replace this layer: another one where sizes are chosen for every layer."""
        return self

    def compared(self, layer: Layer, shape: tuple[int, ...]) -> tuple[Cost, Cost]:
        """Return the cost of `layer` on an input of that shape, for images (1, channels, height, width), and of its
        replacement."""
        params = sum(parameter.numel() for parameter in layer.parameters())
        return Cost(params, _flops(layer, shape)), self.cost_for(layer, shape)


def _flops(layer: nn.Module, shape: tuple[int, ...]) -> int:
    return module_flops(layer, torch.empty(shape, device="meta"))


def replace_convolutions(
    network: nn.Module,
    paths: Iterable[str],
    recipe: Replacing,
    generator: torch.Generator | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> None:
    """Put the recipe's replacements in the place of the convolutions at `paths`, in the order given."""
    replace_layers(network, dict.fromkeys(paths, recipe), generator, statistics)


def replace_layers(
    network: nn.Module,
    ways: Mapping[str, Replacing],
    generator: torch.Generator | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> None:
    """Replace the layers at the paths that `ways` has, each in its way and in the order given; at all places, where the
    network has one of them at several.

    With a generator they get their first weights from the layer they replace; without one they are left for a state
    dict to fill. Layers of the network that work in place stop doing so where a replacement needs that.
    """
    if any(way.needs_output for way in ways.values()):
        switch_off_in_place(network)
    for path, way in ways.items():
        layer = network.get_submodule(path)
        assert isinstance(layer, nn.Conv2d | nn.Linear), path
        form = plain_form(layer)
        replacement = way.build(form.layer)
        if generator is not None:
            known = (statistics or {}).get(path)
            norm = None if known is None else norm_of(network, known)
            flow = None if known is None else Flow.of(known, matrix(form.layer.weight), norm)
            way.initialize(replacement, form.layer, generator, flow)
            _keep_mean_and_scale(way, replacement, form.layer, flow, norm)
        if form.pad is not None:
            replacement = nn.Sequential(OrderedDict(pad=form.pad, conv=replacement))
        replacement.train(layer.training)
        # Only after the first weights: they are drawn where the generator is, on the CPU, the same bits for every
        # device.
        replacement.to(form.layer.weight.device, form.layer.weight.dtype)
        for place in [other for other, module in network.named_modules(remove_duplicate=False) if module is layer]:
            network.set_submodule(place, replacement)


def _keep_mean_and_scale(
    way: Replacing, replacement: nn.Module, layer: Layer, flow: Flow | None, norm: nn.Module | None
) -> None:
    """Let outputs keep their mean, and their scale behind a batch norm, as far as the replacement is known."""
    kernel = None if flow is None else way.kernel_of(replacement)
    if flow is None or kernel is None:
        return
    if norm is None:
        keep_mean(replacement, flow, matrix(layer.weight), matrix(kernel))
    else:
        rebase(norm, flow, matrix(layer.weight), matrix(kernel), layer.bias)
