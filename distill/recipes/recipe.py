"""What every recipe is: a predicate over convolutions and a way to build the replacement of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import nn

from distill.blocks import switch_off_in_place


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

    @abstractmethod
    def initialize(self, replacement: nn.Module, conv: nn.Conv2d, generator: torch.Generator) -> None:
        """Give the replacement its first weights; every random number comes from the generator."""

    def replaces(self, module: nn.Module) -> bool:
        """Whether this recipe makes `module` cheaper: a dense convolution with a kernel larger than one pixel."""
        return isinstance(module, nn.Conv2d) and module.groups == 1 and max(module.kernel_size) > 1


def replace_convolutions(
    network: nn.Module, paths: Iterable[str], recipe: Recipe, generator: torch.Generator | None = None
) -> None:
    """Put the recipe's replacements in the place of the convolutions at `paths`, in the order given.

    With a generator they get their first weights from the convolution they replace; without one they are left for a
    state dict to fill. Layers of the network that work in place stop doing so where the recipe needs that.
    """
    if recipe.needs_output:
        switch_off_in_place(network)
    for path in paths:
        conv = network.get_submodule(path)
        assert isinstance(conv, nn.Conv2d), path
        replacement = recipe.build(conv)
        if generator is not None:
            recipe.initialize(replacement, conv, generator)
        replacement.train(conv.training)
        network.set_submodule(path, replacement.to(conv.weight.device, conv.weight.dtype))
