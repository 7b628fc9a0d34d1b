"""The recipe that makes a block narrower inside: channels that neither its input nor its output has."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill.blocks.chain import agree
from distill.blocks.tracing import UntraceableError
from distill.errors import ConfigError, one_of
from distill.profiling.flops import module_flops
from distill.profiling.statistics import InputStatistics
from distill.recipes.channels import inner_groups
from distill.recipes.group import Group, lost, others, paths_of, take_away
from distill.recipes.recipe import Changes, Cost, Kept, Recipe, View, option
from distill.recipes.thin_start import choose, columns
from distill.recipes.widths import aligned

INITS = ("data", "teacher", "random")
LARGEST_COVARIANCE = 8192  # columns: half a GiB in float64, and minutes of work; more are chosen by norm


@dataclass(frozen=True, kw_only=True)
class Thin(Recipe):
    """Fewer channels inside a block, chosen by optimal brain surgeon over channels, which repairs the other weights."""

    replaces: ClassVar[str] = "channels inside a block, between two of its convolutions or linear layers"

    ratio: float = option(0.5, "channels that stay, as a share of the layer's, above 0 and up to 1")
    align: int = option(8, "widths are multiples of it, where the teacher's are")
    init: str = option("data", "first weights: data, teacher or random")

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError("student.options.ratio", self.ratio, "a number above 0 and up to 1")
        if self.align < 1:
            raise ConfigError("student.options.align", self.align, "an integer >= 1")
        if self.init not in INITS:
            raise ConfigError("student.options.init", self.init, one_of(INITS, self.init))

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        block, x = view.module.eval(), view.sample.float()
        try:
            groups, kept = inner_groups(block, x)
        except UntraceableError as error:
            return None, {view.name: f"its channels cannot be followed: {str(error).partition(chr(10))[0]}"}
        narrower = []
        for group in map(self._narrowed, groups):
            reason = _objection(group, view)
            if reason is None:
                narrower.append(group)
            else:
                kept |= {site.path: reason for site in group.producers}
        narrower, failed = _sound(block, x, narrower)
        kept |= failed
        if not groups and not kept:
            kept[view.name] = "no channels are inside it alone"
        if not narrower:
            return None, kept
        return {"groups": [group.as_json() for group in narrower], "statistics": _statistics(block, narrower)}, kept

    def _narrowed(self, group: Group) -> Group:
        width = group.units * group.step
        return replace(group, kept=aligned(self.ratio * width, width, math.lcm(self.align, group.step)) // group.step)

    def cost(self, view: View, changes: Changes) -> Cost:
        groups, block, x = _groups(changes), view.module.eval(), view.sample[:1]
        params = sum(parameter.numel() for parameter in block.parameters())
        flops = module_flops(block, x)
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
        groups = _groups(changes)
        if generator is None or self.init == "random":
            kept = [torch.arange(group.kept) for group in groups]
        else:
            kept = choose(block, groups, (statistics or {}) if self.init == "data" else {})
        take_away(block, groups, kept)
        if generator is not None and self.init == "random":
            _draw(block, paths_of(groups), generator)
        return list(zip(groups, kept, strict=True))

    def install(self, network: nn.Module, changes: Changes) -> None:
        groups = _groups(changes)
        take_away(network, groups, [torch.arange(group.kept) for group in groups])

    def paths(self, changes: Changes) -> list[str]:
        return paths_of(_groups(changes))

    def wants(self, changes: Changes) -> list[str]:
        return list(changes["statistics"]) if self.init == "data" else []

    def suits(self, network: nn.Module, *, first_layer: bool) -> bool:
        mixing = [
            module
            for module in network.modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        ]
        return len(mixing) > (1 if first_layer else 2)


def _groups(changes: Changes) -> list[Group]:
    return [Group.from_json(values) for values in changes["groups"]]


def _objection(group: Group, view: View) -> str | None:
    layers = [path for path in group.paths if any(True for _ in view.module.get_submodule(path).parameters(False))]
    if not view.changeable.issuperset(layers):
        return "a layer that has its channels is to stay"
    if group.kept == group.units:
        return f"none of its {group.units * group.step} channels would go"
    return None


def _statistics(block: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Return the layers whose inputs say which channels matter, as far as they can be looked at and worked with."""
    readers = dict.fromkeys(site.path for group in groups for site in group.inputs)
    layers = {path: block.get_submodule(path) for path in readers}
    return [
        path
        for path, layer in layers.items()
        # Layers that pad in a forward() of their own see other inputs than those that they are given.
        if type(layer).forward in {nn.Conv2d.forward, nn.Linear.forward}
        and layer.weight[0].numel() <= LARGEST_COVARIANCE  # type: ignore[index]
    ]


def _sound(block: nn.Module, x: Tensor, groups: Sequence[Group]) -> tuple[list[Group], Kept]:
    """Return those groups that are shown to be what they are taken for, and why others stay."""
    if not groups or _failure(block, x, groups) is None:
        return list(groups), {}
    failures = {group: _failure(block, x, [group]) for group in groups}
    sound = [group for group, failure in failures.items() if failure is None]
    together = _failure(block, x, sound) if sound else None
    kept = {site.path: failure for group, failure in failures.items() if failure for site in group.producers}
    if together is None:
        return sound, kept
    return [], kept | {site.path: together for group in sound for site in group.producers}


def _failure(block: nn.Module, x: Tensor, groups: Sequence[Group]) -> str | None:
    """Return in words why a block could not do without some units of these groups, or None: where their readers have
    zeros for these, it must give the same without them, and hand gradients to what is left."""
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(group.units, generator=generator)[: group.kept].sort().values for group in groups]
    student = copy.deepcopy(block)
    try:
        with torch.no_grad():
            for group, units in zip(groups, kept, strict=True):
                _close_readers(student, group, others(group.units, units))
            wanted = student(x)
            take_away(student, groups, kept)
            if not agree(student(x), wanted):
                return "without some of its channels, the block gives something else"
        student.train()(x).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network's own code can raise anything
        reason = str(error).strip().partition("\n")[0]
        return f"without some of its channels, the block fails: {type(error).__name__}: {reason}"
    layers = [student.get_submodule(path) for path in paths_of(groups)]
    learning = all(parameter.grad is not None for layer in layers for parameter in layer.parameters())
    return None if learning else "no gradient reaches it"


def _close_readers(block: nn.Module, group: Group, units: Tensor) -> None:
    for site in group.inputs:
        weight = block.get_submodule(site.path).weight
        assert isinstance(weight, Tensor)
        columns_of_units = columns(weight, site, units).flatten().to(weight.device)
        weight.copy_(weight.flatten(1).index_fill(1, columns_of_units, 0.0).view(weight.shape))


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
