"""Recipes that replace the dense convolutions of a block, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from distill.profiling.flops import module_flops
from distill.profiling.statistics import InputStatistics
from distill.recipes.plain import plain_form
from distill.recipes.recipe import Changes, Cost, Kept, Recipe, View
from distill.recipes.replacement import Replacing, replace_convolutions
from distill.recipes.selection import select


@dataclass(frozen=True, kw_only=True)
class ConvolutionRecipe(Recipe, Replacing):
    """Replaces those convolutions of a block that it makes cheaper, each by itself."""

    replaces: ClassVar[str] = "dense convolutions larger than 1 x 1"

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        wanted = [path for path in view.convolutions if path in view.changeable and _is_large(view.module, path)]
        if not wanted:
            return None, {}
        taken, kept = select(view.module, view.sample, wanted, self)
        return ({"convolutions": list(taken)} if taken else None), kept

    def cost(self, view: View, changes: Changes) -> Cost:
        params = sum(parameter.numel() for parameter in view.module.parameters())
        flops = module_flops(view.module.eval(), view.sample[:1])
        inputs = _inputs_of(view, changes["convolutions"])
        for path, shape in inputs.items():
            conv = plain_form(view.module.get_submodule(path)).conv  # type: ignore[arg-type]
            before, after = self.compared(conv, shape)
            params += after.params - before.params
            flops += after.flops - before.flops
        return Cost(params, flops)

    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        replace_convolutions(block, changes["convolutions"], self, generator, statistics)
        return block

    def install(self, network: nn.Module, changes: Changes) -> None:
        replace_convolutions(network, changes["convolutions"], self)

    def wants(self, changes: Changes) -> list[str]:
        return list(changes["convolutions"]) if getattr(self, "init", None) == "data" else []

    def paths(self, changes: Changes) -> list[str]:
        return list(changes["convolutions"])

    def suits(self, network: nn.Module, *, first_layer: bool) -> bool:
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        fitting = [module for module in convolutions if self.fits(module)]
        return bool(fitting) and (first_layer or fitting != convolutions[:1])


def _is_large(block: nn.Module, path: str) -> bool:
    conv = block.get_submodule(path)
    return isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1


@torch.no_grad()
def _inputs_of(view: View, paths: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the form in which one image reaches each of these convolutions."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for path in paths:

        def see(_: nn.Module, args: tuple[torch.Tensor, ...], path: str = path) -> None:
            shapes[path] = (1, *args[0].shape[1:])

        hooks.append(view.module.get_submodule(path).register_forward_pre_hook(see))
    try:
        view.module.eval()(view.sample[:1].float())
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
