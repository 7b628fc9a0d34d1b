"""The first weights of narrower blocks: which units of their groups stay, and what their readers' weights become.

The block keeps its widths here: readers of what is to go get zeros for it, and group.take_away() makes that smaller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from distill.profiling.sketch import Sketch
from distill.profiling.statistics import InputStatistics
from distill.recipes.group import Group, Site, others
from distill.recipes.least_squares import Flow, keep_mean, norm_of, rebase
from distill.recipes.surgeon import reader, regularized, remaining, repaired


@dataclass(frozen=True)
class _Lost:
    """What layers have lost to the groups before: outputs, and places among the weights of one output."""

    outputs: dict[str, Tensor] = field(default_factory=lambda: defaultdict(_nothing))
    columns: dict[str, Tensor] = field(default_factory=lambda: defaultdict(_nothing))


@torch.no_grad()
def choose(block: nn.Module, groups: Sequence[Group], statistics: Mapping[str, InputStatistics]) -> list[Tensor]:
    """Return the units that stay of every group (numbers, in order), and repair the block for the loss of the others
    where all consumers of a group have statistics. Where they have not, the units with the largest weights stay."""
    lost = _Lost()
    kept: list[Tensor] = []
    # From the last group on: what a layer is to put out is settled before its inputs are chosen for that alone.
    for group in reversed(groups):
        if group.kept == group.units:
            kept.append(torch.arange(group.units))
            continue
        known = all(_knows(statistics, block, site.path) for site in group.consumers)
        kept.append(_by_surgery(block, group, statistics, lost) if known else _by_norm(block, group))
        away = others(group.units, kept[-1])
        for site in group.outputs:
            lost.outputs[site.path] = torch.cat([lost.outputs[site.path], site.channels(away).flatten()])
        for site in group.inputs:
            places = columns(_layer(block, site.path).weight, site, away).flatten()
            lost.columns[site.path] = torch.cat([lost.columns[site.path], places])
    return kept[::-1]


@torch.no_grad()
def repair(
    block: nn.Module, groups: Sequence[Group], kept: Sequence[Tensor], statistics: Mapping[str, InputStatistics]
) -> None:
    """Repair a block for the loss of all but the units `kept` of every group, where its layers have statistics."""
    lost: dict[str, Tensor] = defaultdict(_nothing)
    gates: dict[str, Tensor] = defaultdict(_nothing)
    for group, units in zip(groups, kept, strict=True):
        away = others(group.units, units)
        for role, found in (group.consumers, lost), (group.gates, gates):
            for site in role:
                places = columns(_layer(block, site.path).weight, site, away).flatten()
                found[site.path] = torch.cat([found[site.path], places])
    for path, places in lost.items():
        if _knows(statistics, block, path):
            covariance = regularized(statistics[path].covariance)
            left = others(len(statistics[path].mean), places)
            _put(block, path, repaired(_kernel(block, path), covariance, left), statistics[path])
    for path, places in gates.items():
        _close(block, path, places, statistics.get(path))


def _nothing() -> Tensor:
    return torch.arange(0)


def _knows(statistics: Mapping[str, InputStatistics], block: nn.Module, path: str) -> bool:
    return path in statistics and len(statistics[path].mean) == _layer(block, path).weight[0].numel()


def _by_norm(block: nn.Module, group: Group) -> Tensor:
    """Return the units with the largest product of the norms of the weights that make them and that read them."""
    every = torch.arange(group.units)
    made, read = torch.zeros(2, group.units, dtype=torch.float64)
    for site in group.producers:
        made += _kernel(block, site.path).square().sum(1)[site.channels(every)].sum(1)
    for site in group.consumers:
        read += _kernel(block, site.path).square().sum(0)[columns(_layer(block, site.path).weight, site, every)].sum(1)
    first: Tensor = (made * read).argsort(descending=True, stable=True)[: group.kept]
    return first.sort().values


def _by_surgery(block: nn.Module, group: Group, statistics: Mapping[str, InputStatistics], lost: _Lost) -> Tensor:
    """Return the units that the group's consumers can least do without, and repair those for the loss of the others."""
    every = torch.arange(group.units)
    reads: dict[str, Tensor] = {}
    covariances = {site.path: regularized(statistics[site.path].covariance) for site in group.consumers}
    readers = []
    for path, covariance in covariances.items():
        sites = [site for site in group.consumers if site.path == path]
        reads[path] = torch.cat([columns(_layer(block, path).weight, site, every) for site in sites], 1)
        rest = others(len(statistics[path].mean), torch.cat([reads[path].flatten(), lost.columns[path]]))
        kernel = _kernel(block, path)
        scale = Flow.of(statistics[path], kernel, norm_of(block, statistics[path])).scale.clone()
        scale[lost.outputs[path]] = 0.0
        seen = scale[:, None] * kernel
        # Over the deviation of its outputs: the loudest of several readers is not to decide alone.
        loudness = ((seen @ covariance) * seen).sum().clamp_min(torch.finfo(torch.float64).tiny) ** 0.25
        readers.append(reader(seen / loudness, covariance, reads[path], rest))
    kept = remaining(readers, group.units, group.kept)
    away = others(group.units, kept)
    for path, covariance in covariances.items():
        left = others(len(statistics[path].mean), torch.cat([reads[path][away].flatten(), lost.columns[path]]))
        _put(block, path, repaired(_kernel(block, path), covariance, left), statistics[path])
    for site in group.gates:
        lost_places = columns(_layer(block, site.path).weight, site, away).flatten()
        _close(block, site.path, lost_places, statistics.get(site.path))
    return kept


def _put(block: nn.Module, path: str, kernel: Tensor, seen: InputStatistics) -> None:
    """Give a layer another kernel, and move what follows it so that its mean and its scale stay."""
    layer, before, norm = _layer(block, path), _kernel(block, path), norm_of(block, seen)
    layer.weight.copy_(kernel.view(layer.weight.shape))
    flow = Flow.of(seen, before, norm)
    if norm is not None:
        rebase(norm, flow, before, kernel, layer.bias)
    else:
        keep_mean(layer, flow, before, kernel)


def _close(block: nn.Module, path: str, lost: Tensor, seen: InputStatistics | None) -> None:
    """Let a gate read nothing at these places of its weights but what is there on average, where that is known."""
    layer, kernel = _layer(block, path), _kernel(block, path)
    if seen is not None and layer.bias is not None:
        layer.bias.add_((kernel[:, lost] @ seen.mean[lost]).to(layer.bias))
    kernel[:, lost] = 0.0
    layer.weight.copy_(kernel.view(layer.weight.shape))


def columns(weight: Tensor, site: Site, units: Tensor) -> Tensor:
    """Return, for these units (n), the places (n, m) of all that reads them in one output's weights."""
    taps = weight[0, 0].numel()
    channels = site.channels(units)
    return (channels[:, :, None] * taps + torch.arange(taps)).flatten(1)


def left_of(
    seen: InputStatistics, block: nn.Module, path: str, kept: Sequence[tuple[Group, Tensor]]
) -> InputStatistics:
    """Return what is known of a layer's inputs without those that groups have lost, in the block that has lost them."""
    sites = [(site, others(group.units, units)) for group, units in kept for site in group.inputs if site.path == path]
    gone = [columns(_layer(block, path).weight, site, away).flatten() for site, away in sites]
    left = others(len(seen.mean), torch.cat([_nothing(), *gone]))
    covariance = seen.covariance
    inner = covariance.within(left) if isinstance(covariance, Sketch) else covariance[left][:, left]
    return replace(seen, mean=seen.mean[left], covariance=inner)


def _layer(block: nn.Module, path: str) -> nn.Conv2d | nn.Linear:
    layer = block.get_submodule(path)
    assert isinstance(layer, nn.Conv2d | nn.Linear), path
    return layer


def _kernel(block: nn.Module, path: str) -> Tensor:
    """Return the weights of a layer (outputs, weights of one)."""
    return _layer(block, path).weight.detach().cpu().double().flatten(1)
