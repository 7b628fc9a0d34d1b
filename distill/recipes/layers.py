"""Recipes that replace layers of a block, one by one, each by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.plain import plain_form
from distill.recipes.recipe import Changes, Cost, Kept, Recipe, View
from distill.recipes.replacement import Replacing, replace_layers
from distill.recipes.selection import select


@dataclass(frozen=True, kw_only=True)
class LayerRecipe(Recipe, Replacing):
    """Replaces those layers of a block that it makes cheaper."""

    @abstractmethod
    def wanted(self, view: View) -> list[str]:
        """Return the paths of a block's layers that it would replace, where that pays, in the order of use."""

    @abstractmethod
    def changes(self, view: View, paths: tuple[str, ...]) -> Changes:
        """Return what it changes where it replaces the layers at `paths`."""

    @abstractmethod
    def ways(self, changes: Changes) -> dict[str, Replacing]:
        """Return what replaces each layer that is changed, by its path."""

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        wanted = self.wanted(view)
        if not wanted:
            return None, {}
        taken, kept = select(view.module, view.sample, wanted, self)
        return (self.changes(view, taken) if taken else None), kept

    def cost(self, view: View, changes: Changes) -> Cost:
        ways, before = self.ways(changes), view.cost
        params, flops = before.params, before.flops
        for path, shapes in _inputs_of(view, ways).items():
            layer = plain_form(view.module.get_submodule(path)).layer  # type: ignore[arg-type]
            compared = [ways[path].compared(layer, shape) for shape in shapes]  # once for every use
            params += compared[0][1].params - compared[0][0].params
            flops += sum(after.flops - before.flops for before, after in compared)
        return Cost(params, flops)

    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        replace_layers(block, self.ways(changes), generator, statistics)
        return block

    def install(self, network: nn.Module, changes: Changes) -> None:
        replace_layers(network, self.ways(changes))

    def paths(self, changes: Changes) -> list[str]:
        return list(self.ways(changes))


@torch.no_grad()
def _inputs_of(view: View, paths: Iterable[str]) -> dict[str, list[tuple[int, ...]]]:
    """Return the forms in which one image reaches each of these layers, one for every use."""
    shapes: dict[str, list[tuple[int, ...]]] = {path: [] for path in paths}
    hooks = []
    for path, found in shapes.items():

        def see(_: nn.Module, args: tuple[torch.Tensor, ...], found: list[tuple[int, ...]] = found) -> None:
            found.append(tuple(args[0].shape))

        hooks.append(view.module.get_submodule(path).register_forward_pre_hook(see))
    try:
        view.module.eval()(view.sample[:1].float())
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
