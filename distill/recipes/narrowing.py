"""What recipes that take channels away from layers have in common: how many stay, what that costs, and what is left."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.group import Group, lost, paths_of, take_away
from distill.recipes.heads import PROJECTIONS, open_attention
from distill.recipes.recipe import INIT, Changes, Cost, Recipe, View, count, option, share
from distill.recipes.widths import aligned


@dataclass(frozen=True, kw_only=True)
class Narrowing(Recipe):
    """Fewer channels in the same layers: `changes` say the groups of channels, and how many of each stay."""

    ratio: float = option(0.5, "channels that stay, as a share of the layer's, above 0 and up to 1", share)
    align: int = option(8, "widths are multiples of it, where the teacher's are", count)
    init: str = option("data", "first weights: data, teacher or random", INIT)

    def narrowed(self, group: Group) -> Group:
        """Return a group with the units that are to stay of it."""
        width = group.units * group.step
        return replace(group, kept=aligned(self.ratio * width, width, math.lcm(self.align, group.step)) // group.step)

    def cost(self, view: View, changes: Changes) -> Cost:
        groups, block, x = groups_of(changes), view.module.eval(), view.sample[:1]
        if any(group.heads for group in groups):  # whose attention has costs of its own
            block = copy.deepcopy(block)
            self.install(block, changes)
            return replace(view, module=block).cost
        before = view.cost
        params, flops = before.params, before.flops
        positions = _positions(block, x, paths_of(groups))
        for path in paths_of(groups):
            layer, (outputs, inputs) = block.get_submodule(path), lost(groups, path)
            tensors = [tensor for tensor in layer.parameters(recurse=False) if tensor.dim() > 0]
            for tensor in tensors:
                less = _numel_after(tensor, outputs, inputs) - tensor.numel()
                params += less
                if tensor is layer.weight and isinstance(layer, nn.Conv2d | nn.Linear):
                    flops += 2 * positions[path] * less
        return Cost(params, flops)

    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        self.narrow(block, changes, generator, statistics)
        return block

    def narrow(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> list[tuple[Group, Tensor]]:
        """Make a block its student(), in place; return the groups with the units that each has kept."""
        groups = groups_of(changes)
        open_attention(block, _with_heads(groups))
        if generator is None or self.init == "random":
            kept = [torch.arange(group.kept) for group in groups]
        else:
            kept = self.settle(block, changes, (statistics or {}) if self.init == "data" else {})
        take_away(block, groups, kept)
        if generator is not None and self.init == "random":
            _draw(block, paths_of(groups), generator)
        return list(zip(groups, kept, strict=True))

    def install(self, network: nn.Module, changes: Changes) -> None:
        groups = groups_of(changes)
        open_attention(network, _with_heads(groups))
        take_away(network, groups, [torch.arange(group.kept) for group in groups])

    def paths(self, changes: Changes) -> list[str]:
        groups = groups_of(changes)
        # What the teacher's has as one module may be layers in the student's.
        whole = {f"{path}.{layer}": path for path in _with_heads(groups) for layer in PROJECTIONS}
        return list(dict.fromkeys(whole.get(path, path) for path in paths_of(groups)))

    def wants(self, changes: Changes) -> list[str]:
        return list(changes["statistics"]) if self.init == "data" else []

    def unwatched(self, changes: Changes) -> list[str]:
        readers = dict.fromkeys(site.path for group in groups_of(changes) for site in group.consumers)
        return [path for path in readers if self.init == "data" and path not in changes["statistics"]]

    @abstractmethod
    def settle(self, block: nn.Module, changes: Changes, statistics: Mapping[str, InputStatistics]) -> list[Tensor]:
        """Return the units that stay of every group, as numbers in order, and repair a block, in place, for the loss of
        the others as far as its layers have statistics."""

    def suits(self, network: nn.Module, *, first_layer: bool) -> bool:
        mixing = [
            module
            for module in network.modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        ]
        return len(mixing) > (1 if first_layer else 2)


def groups_of(changes: Changes) -> list[Group]:
    """Return the groups that changes speak of."""
    return [Group.from_json(values) for values in changes["groups"]]


def _with_heads(groups: Sequence[Group]) -> list[str]:
    return [site.path for group in groups for site in group.heads]


def watchable(block: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Return the layers whose inputs say which channels matter, as far as they can be looked at and worked with."""
    readers = dict.fromkeys(site.path for group in groups for site in group.inputs)
    layers = {path: block.get_submodule(path) for path in readers}
    return [
        path
        for path, layer in layers.items()
        # Layers that pad in a forward() of their own see other inputs than those that they are given.
        if type(layer).forward in {nn.Conv2d.forward, nn.Linear.forward}
    ]


def _numel_after(tensor: Tensor, outputs: int, inputs: int) -> int:
    """Return the numbers in a layer's tensor that has lost outputs, and inputs where it has any."""
    rows = tensor.shape[0] - outputs
    return rows if tensor.dim() == 1 else rows * (tensor.shape[1] - inputs) * math.prod(tensor.shape[2:])


@torch.no_grad()
def _positions(block: nn.Module, x: Tensor, paths: Sequence[str]) -> dict[str, int]:
    """Return how often layers apply their weights to one image."""
    found: dict[str, int] = {}
    hooks = []
    for path in paths:
        layer = block.get_submodule(path)

        def count(layer: nn.Module, _: object, out: Tensor, path: str = path) -> None:
            found[path] = out.numel() // (out.shape[1] if isinstance(layer, nn.Conv2d) else out.shape[-1])

        hooks.append(layer.register_forward_hook(count))
    try:
        block(x.float())
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _draw(block: nn.Module, paths: Sequence[str], generator: torch.Generator) -> None:
    """Give layers random weights (He et al. 2015)."""
    for path in paths:
        layer = block.get_submodule(path)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            drawn = torch.empty(layer.weight.shape)  # on the CPU, where the generator is
            nn.init.kaiming_normal_(drawn, mode="fan_in", nonlinearity="relu", generator=generator)
            layer.weight.copy_(drawn)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_parameters()
