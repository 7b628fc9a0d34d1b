"""What every recipe is: a predicate over convolutions and a way to build the replacement of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn

from distill.blocks.chain import switch_off_in_place
from distill.recipes.plain import plain_form


class Recipe(ABC):
    """A way to replace one convolution. Its constructor's arguments travel in student.json and rebuild it."""

    needs_output = False  # whether a replacement's backward pass reads its output, which a layer behind must then leave

    def __init__(self, *, rank: int, init: str) -> None:
        self.rank = rank
        self.init = init

    def options(self) -> dict[str, object]:
        """Return the constructor's keyword arguments, all JSON values."""
        return {"rank": self.rank, "init": self.init}

    @abstractmethod
    def build(self, conv: nn.Conv2d) -> nn.Module:
        """Return the replacement of `conv` with the same input and output shapes, its weights not yet meaningful."""

    def at_full_size(self, conv: nn.Conv2d) -> nn.Module | None:
        """Return a replacement of `conv`, weights and all, that gives exactly what it gives; None where the recipe has
        none."""
        return None

    @abstractmethod
    def initialize(self, replacement: nn.Module, conv: nn.Conv2d, generator: torch.Generator) -> None:
        """Give the replacement its first weights; every random number comes from the generator."""

    def replaces(self, module: nn.Module) -> bool:
        """Whether `module` is what this recipe is for: a dense convolution with a kernel larger than one pixel."""
        return isinstance(module, nn.Conv2d) and module.groups == 1 and max(module.kernel_size) > 1


def replace_convolutions(
    network: nn.Module, paths: Iterable[str], recipe: Recipe, generator: torch.Generator | None = None
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
            recipe.initialize(replacement, form.conv, generator)
        if form.pad is not None:
            replacement = nn.Sequential(OrderedDict(pad=form.pad, conv=replacement))
        replacement.train(conv.training)
        replacement.to(form.conv.weight.device, form.conv.weight.dtype)
        for place in [other for other, module in network.named_modules(remove_duplicate=False) if module is conv]:
            network.set_submodule(place, replacement)
