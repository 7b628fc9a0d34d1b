"""The recipe that makes what passes between blocks narrower, such as the residual stream of a stage.

All blocks that make, pass on or read the channels of a stream lose the same ones. Which stay is chosen once, for all
layers that read them together; every block's student is then the teacher's block without the others at its ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.group import Group
from distill.recipes.narrowing import Narrowing, groups_of
from distill.recipes.recipe import Changes, Ends, Kept, View
from distill.recipes.thin_start import choose, repair


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
