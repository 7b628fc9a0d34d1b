"""Channels that can only be taken away together, and taking them away: smaller tensors in the same layers.

A unit of a group is what can go alone: one channel, or all channels of a convolution's group, at every layer that has
it. Knows nothing of graphs, and of which units are worth keeping.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from distill.blocks.tracing import module_stack
from distill.recipes.heads import remove_heads
from distill.recipes.zeros import remove_zeros

ROLES = ("producers", "passes", "consumers", "gates", "zeros", "heads")


@dataclass(frozen=True)
class Site:
    """Where a group's channels are at a layer: `each` of them a unit, one after the other, from channel `start` on."""

    path: str
    start: int
    each: int

    def channels(self, units: Tensor) -> Tensor:
        """Return, for these units (n), the numbers of their channels (n, each)."""
        return self.start + units[:, None] * self.each + torch.arange(self.each)


@dataclass(frozen=True)
class Group:
    """`units`, of which a number is `kept`. `producers` are the layers that put the channels out. `passes` work on
    every channel alone, convolutions in groups among them. `gates` read one value a channel and image, and scale the
    channels by what they make of it; `consumers` are all other layers that read them. `zeros` are modules that add them
    as zeros before others (where a site starts at an even number) or after them (odd): along the dimension half as far
    from the last one. `heads` are modules whose code has them as heads of attention."""

    units: int
    kept: int
    producers: tuple[Site, ...]
    passes: tuple[Site, ...]
    consumers: tuple[Site, ...]
    gates: tuple[Site, ...]
    zeros: tuple[Site, ...] = ()
    heads: tuple[Site, ...] = ()

    @property
    def step(self) -> int:
        """Channels of a unit at the producer that makes the most of it."""
        return max(site.each for site in self.producers)

    @property
    def outputs(self) -> tuple[Site, ...]:
        """Where the channels are a layer's outputs."""
        return (*self.producers, *self.passes)

    @property
    def inputs(self) -> tuple[Site, ...]:
        """Where they are the inputs of a layer that mixes them."""
        return (*self.consumers, *self.gates)

    @property
    def paths(self) -> list[str]:
        """The layers that it runs through."""
        return list(dict.fromkeys(site.path for site in (*self.outputs, *self.inputs)))

    def within(self, paths: Collection[str]) -> Group:
        """Return what of it is at these layers."""
        sites = {role: tuple(site for site in getattr(self, role) if site.path in paths) for role in ROLES}
        return Group(units=self.units, kept=self.kept, **sites)

    def joined(self, other: Group) -> Group:
        """Return it with the places of the same group at other layers."""
        sites = {role: (*getattr(self, role), *getattr(other, role)) for role in ROLES}
        return Group(units=self.units, kept=self.kept, **sites)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Group:
        """Return what as_json() was given of."""
        sites = {role: tuple(Site(**site) for site in values.get(role, ())) for role in ROLES}
        return cls(units=values["units"], kept=values["kept"], **sites)


def places_in(module: nn.Module) -> set[str]:
    """Return the paths of all modules of a block, of those too that its graph has only the operations of."""
    graph = module.graph if isinstance(module, fx.GraphModule) else fx.Graph()
    traced = {path for node in graph.nodes for _, path, _ in module_stack(node)}
    return traced | {path for path, _ in module.named_modules()}


def paths_of(groups: Iterable[Group]) -> list[str]:
    """Return the layers that groups run through."""
    return list(dict.fromkeys(path for group in groups for path in group.paths))


def lost(groups: Iterable[Group], path: str) -> tuple[int, int]:
    """Return how many outputs and inputs a layer loses."""
    outputs = inputs = 0
    for group in groups:
        gone = group.units - group.kept
        outputs += sum(gone * site.each for site in group.outputs if site.path == path)
        inputs += sum(gone * site.each for site in group.inputs if site.path == path)
    return outputs, inputs


def take_away(network: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor]) -> None:
    """Leave the units `kept` (numbers in order, one tensor a group) of every group in a network, in place."""
    for path in paths_of(groups):
        layer = network.get_submodule(path)
        gone: dict[str, list[Tensor]] = {"outputs": [], "inputs": []}
        for group, units in zip(groups, kept, strict=True):
            away = others(group.units, units)
            for side, channels in gone.items():
                channels += [site.channels(away).flatten() for site in getattr(group, side) if site.path == path]
        _narrow(layer, *(torch.cat([torch.arange(0), *channels]) for channels in gone.values()))
    zeros: dict[tuple[str, int], list[int]] = {}
    for group in groups:
        for site in group.zeros:
            fewer = zeros.setdefault((site.path, -(site.start // 2) - 1), [0, 0])
            fewer[site.start % 2] += site.each * (group.units - group.kept)
    for (path, dim), (before, after) in zeros.items():
        remove_zeros(network, path, dim, before, after)
    for group in groups:
        for site in group.heads:
            remove_heads(network, site.path, group.kept, site.each)


def others(total: int, chosen: Tensor) -> Tensor:
    """Return the numbers below `total` that are not among the chosen ones, in order."""
    left = torch.ones(total, dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten()


@torch.no_grad()
def _narrow(layer: nn.Module, outputs: Tensor, inputs: Tensor) -> None:
    """Take these outputs and inputs away from a layer."""
    width = _outputs(layer)
    stays = others(width, outputs)
    tensors = {**layer._parameters, **layer._buffers}
    for name, tensor in tensors.items():
        if tensor is None or tensor.dim() == 0 or len(tensor) != width:
            continue
        smaller = tensor.index_select(0, stays.to(tensor.device))
        if name == "weight" and len(inputs):
            smaller = smaller.index_select(1, others(tensor.shape[1], inputs).to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        setattr(layer, name, smaller)
    _tell(layer, len(stays))


def _outputs(layer: nn.Module) -> int:
    names = ("out_channels", "out_features", "num_features", "num_parameters")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def _tell(layer: nn.Module, outputs: int) -> None:
    """Give a layer the numbers that go with its tensors."""
    if isinstance(layer, nn.Conv2d):
        layer.groups = layer.groups * outputs // layer.out_channels if layer.groups > 1 else 1
        layer.out_channels, layer.in_channels = outputs, layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = outputs, layer.weight.shape[1]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = outputs
    else:
        layer.num_features = outputs  # type: ignore[assignment]
