"""Recipes that replace the dense convolutions of a block, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from distill.recipes.layers import LayerRecipe
from distill.recipes.recipe import Changes, View
from distill.recipes.replacement import Replacing


@dataclass(frozen=True, kw_only=True)
class ConvolutionRecipe(LayerRecipe):
    """Replaces those convolutions of a block that it makes cheaper, each by itself."""

    replaces: ClassVar[str] = "dense convolutions larger than 1 x 1"

    def wanted(self, view: View) -> list[str]:
        return [path for path in view.convolutions if path in view.changeable and _is_large(view.module, path)]

    def changes(self, view: View, paths: tuple[str, ...]) -> Changes:
        return {"convolutions": list(paths)}

    def ways(self, changes: Changes) -> dict[str, Replacing]:
        return dict.fromkeys(changes["convolutions"], self)

    def wants(self, changes: Changes) -> list[str]:
        return list(changes["convolutions"]) if getattr(self, "init", None) == "data" else []

    def suits(self, network: nn.Module, *, first_layer: bool) -> bool:
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        fitting = [module for module in convolutions if self.fits(module)]
        return bool(fitting) and (first_layer or fitting != convolutions[:1])


def _is_large(block: nn.Module, path: str) -> bool:
    conv = block.get_submodule(path)
    return isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1
