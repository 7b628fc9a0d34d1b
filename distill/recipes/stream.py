"""The recipe that makes what passes between blocks narrower, such as the residual stream of a stage.

All blocks that make, pass on or read the channels of a stream lose the same ones. Which stay is chosen once, for all
layers that read them together; every block's student is then the teacher's block without the others at its ends.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.blocks.tracing import UntraceableError
from distill.profiling.statistics import InputStatistics
from distill.recipes.channels import Followed, Part, follow
from distill.recipes.group import Group, places_in
from distill.recipes.narrowing import Narrowing, groups_of, watchable
from distill.recipes.recipe import Changes, Ends, Kept, View
from distill.recipes.soundness import sound
from distill.recipes.thin_start import choose, repair
from distill.recipes.widths import aligned


@dataclass(frozen=True, kw_only=True)
class Stream(Narrowing):
    """Fewer channels between blocks, chosen by optimal brain surgeon over channels for all their readers at once.

    `changes` have, besides the groups as far as they are in the block: `streams`, the number of each in the network;
    `units`, which of its units stay; `reads` and `gives`, the parts of the block's input and output, each a group's (or
    none's) units, so many channels a unit.
    """

    replaces: ClassVar[str] = "channels that pass between blocks, such as a residual stream's"

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        return None, {view.name: "a stream runs through several blocks"}

    def settle(self, block: nn.Module, changes: Changes, statistics: Mapping[str, InputStatistics]) -> list[Tensor]:
        groups, units = groups_of(changes), [torch.tensor(units, dtype=torch.int64) for units in changes["units"]]
        repair(block, groups, units, statistics)
        return units

    def ends(self, changes: Changes) -> Ends:
        reads, gives = (_channels(changes[end], changes["units"]) for end in ("reads", "gives"))
        return reads, gives


def find_streams(
    modules: Sequence[nn.Module], x: Tensor, recipes: Mapping[int, Stream]
) -> tuple[dict[int, Changes], Kept]:
    """Return what changes in which of the blocks of a whole network, and why other streams stay.

    `modules` are all blocks in eval mode, `x` the first one's input (two rows or more), `recipes` those of the blocks
    that take part. A stream is as wide as the blocks that make it are asked for. Which units stay is not chosen yet: of
    every group the first.
    """
    try:
        found = follow(modules, x)
    except UntraceableError as error:
        return {}, {"streams": f"their channels cannot be followed: {str(error).partition(chr(10))[0]}"}
    blocks = {path: block for block, module in enumerate(modules) for path in places_in(module)}
    kept = {path: reason for path, reason in found.kept.items() if path in found.crossing}
    streams, stay = _narrowed(found, modules, blocks, recipes)
    groups, failed = sound(modules, x, list(streams.values()))
    streams = {number: group for number, group in streams.items() if group in groups}
    changed = set().union(*(group.paths for group in groups))
    kept = {path: reason for path, reason in (kept | stay | failed).items() if path not in changed}
    return {
        block: changes for block, module in enumerate(modules) if (changes := _changes(block, module, found, streams))
    }, kept


def _narrowed(
    found: Followed, modules: Sequence[nn.Module], blocks: Mapping[str, int], recipes: Mapping[int, Stream]
) -> tuple[dict[int, Group], Kept]:
    """Return the streams, by number, with the units that are to stay of them, and why others stay whole."""
    numbers = {part.group for parts in found.boundaries for part in parts if part.group is not None}
    asked: dict[int, Stream] = {}
    kept: Kept = {}
    for number in sorted(numbers):
        group = found.groups[number]
        layers = [path for path in group.paths if modules[blocks[path]].get_submodule(path).state_dict()]
        making = {recipes.get(blocks[site.path]) for site in group.producers}
        one = making.pop()
        if one is None or not recipes.keys() >= {blocks[path] for path in layers}:
            kept |= {site.path: "a block that has its channels has another recipe, or none" for site in group.producers}
        elif making:
            kept |= {site.path: "the blocks that make its channels ask for several widths" for site in group.producers}
        else:
            asked[number] = one
    outputs = {
        site.path: len(modules[blocks[site.path]].get_submodule(site.path).weight)  # type: ignore[arg-type]
        for number in asked
        for site in found.groups[number].producers
    }
    narrower = _widths({number: found.groups[number] for number in asked}, asked, outputs)
    whole = [group for group in narrower.values() if group.kept == group.units]
    for group in whole:
        reason = f"none of its {group.units * group.step} channels would go"
        kept |= {site.path: reason for site in group.producers}
    return {number: group for number, group in narrower.items() if group not in whole}, kept


def _widths(groups: Mapping[int, Group], asked: Mapping[int, Stream], outputs: Mapping[str, int]) -> dict[int, Group]:
    """Return the groups with the units that are to stay, so that the narrowest layer that makes a group is as wide as
    asked; `outputs` are the widths of layers. Groups that are beside others in that have what is left for them."""
    each = {number: Counter[str]() for number in groups}  # channels of a unit, by layer
    for number, group in groups.items():
        for site in group.producers:
            each[number][site.path] += site.each
    layer = {number: min(each[number], key=lambda path: outputs[path]) for number in groups}
    found: dict[int, Group] = {}
    for number in sorted(groups, key=lambda number: (outputs[layer[number]], number)):
        path, group = layer[number], groups[number]
        beside = [other for other in groups if each[other][path]]
        waiting = sum(each[other][path] * groups[other].units for other in beside if other not in found)
        gone = sum(each[other][path] * (one.units - one.kept) for other, one in found.items())
        wanted = aligned(asked[number].ratio * outputs[path], outputs[path], math.lcm(asked[number].align, group.step))
        left = max(0, wanted - (outputs[path] - gone - waiting))
        found[number] = replace(group, kept=min(group.units, group.units * left // waiting))
    return dict(sorted(found.items()))


def _changes(block: int, module: nn.Module, found: Followed, streams: Mapping[int, Group]) -> Changes | None:
    """Return what a block loses, None where it has no layer that loses anything."""
    paths = places_in(module)
    ends = [found.boundaries[end] if 0 <= end < len(found.boundaries) else () for end in (block - 1, block)]
    passing = {part.group for parts in ends for part in parts}
    own = {number: group.within(paths) for number, group in streams.items()}
    own = {number: group for number, group in own.items() if group.paths or number in passing}
    if not any(group.paths for group in own.values()):
        return None
    reads, gives = (_parts(parts, list(own)) for parts in ends)
    return {
        "groups": [group.as_json() for group in own.values()],
        "streams": list(own),
        "units": [list(range(group.kept)) for group in own.values()],
        "reads": reads,
        "gives": gives,
        "statistics": watchable(module, list(own.values())),
    }


def _parts(parts: Iterable[Part], own: Sequence[int]) -> list[list[Any]] | None:
    found = [[own.index(part.group) if part.group in own else None, part.units, part.each] for part in parts]
    return found if any(group is not None for group, _, _ in found) else None


def _channels(
    parts: Sequence[Sequence[Any]] | None, kept: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...] | None:
    """Return the teacher's channels that are left at a boundary."""
    if parts is None:
        return None
    left, start = [], 0
    for group, units, each in parts:
        stay = range(units) if group is None else kept[group]
        left += [(start + unit * each + one,) for unit in stay for one in range(each)]
        start += units * each
    return tuple(left)


def choose_units(
    network: nn.Module, changes: Iterable[Changes], statistics: Mapping[str, InputStatistics]
) -> dict[int, list[int]]:
    """Return the units that stay of every stream, by its number, for what its blocks are to change; `network` is a copy
    of the teacher, whose weights change."""
    found: dict[int, Group] = {}
    for one in changes:
        for number, group in zip(one["streams"], groups_of(one), strict=True):
            found[number] = found[number].joined(group) if number in found else group
    kept = choose(network, list(found.values()), statistics)
    return {number: units.tolist() for number, units in zip(found, kept, strict=True)}


def with_units(changes: Changes, units: Mapping[int, Sequence[int]]) -> Changes:
    """Return what a block is to change when these units of streams, by number, stay."""
    return {**changes, "units": [list(units[number]) for number in changes["streams"]]}
