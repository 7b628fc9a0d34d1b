"""What may stand in the place of a block, or of several that change together, and what a network then has of every
amount."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.job.candidates import Candidate
from distill.profiling.block_costs import count_flops
from distill.recipes.stream import with_units
from distill.storage.aliases import each_once

SIZES = ("ratio", "rank", "energy", "align")  # options that only say how large something is, and may come to the same
BETWEEN = ".."  # the names of the first and the last of blocks in a row

Amounts = Mapping[str, float]
Units = Mapping[int, Sequence[int]]  # which units stay of streams, by their number


@dataclass(frozen=True)
class Swap:
    """Candidates in the places of blocks, each fit for the others, and how much more than the teacher the network has
    of every amount with them (less: a negative number). Of an amount that is a sum and the highest of `peaks` besides,
    `amounts` are what adds up, and `peaks` how much higher this one's is than the teacher's highest.

    Most are one candidate of one block. The narrower student of a stream has one for every block with a layer of it,
    in the order of blocks; a block between these that has none stays as it is.
    """

    members: tuple[Candidate, ...]
    amounts: Amounts
    peaks: Amounts = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The boundary that it reads."""
        return self.members[0].input

    @property
    def end(self) -> int:
        """The boundary that it gives."""
        return self.members[-1].target

    @property
    def covers(self) -> range:
        """The blocks that have nothing else then."""
        return range(self.first, self.end)

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.members[0].name

    @property
    def label(self) -> str:
        return self.members[0].label

    @property
    def trains(self) -> bool:
        return any(one.trains for one in self.members)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """Everything that rebuilds it in a network of the architecture, as JSON values."""
        return [{"block": one.input, **one.facts} for one in self.members]

    def students(self, chain: Chain) -> dict[int, nn.Module]:
        """Return the modules of its members by block, with weights that mean nothing."""
        return {one.input: one.built(chain) for one in self.members}

    def with_units(self, units: Units) -> Swap:
        """Return the swap with the units of its streams that stay."""
        return replace(
            self, members=tuple(replace(one, changes=with_units(one.changes, units)) for one in self.members)
        )


def place_name(chain: Chain, first: int, end: int) -> str:
    """Return what blocks in a row are called, from one to the one before `end`."""
    names = chain.blocks[first].name, chain.blocks[end - 1].name
    return names[0] if end == first + 1 else BETWEEN.join(names)


def swaps_of(chain: Chain, found: Iterable[Sequence[tuple[Candidate, nn.Module]]]) -> list[Swap]:
    """Return candidates (of one or several blocks each, with their modules, whose weights mean nothing) with their
    amounts: in the order of blocks, those of single blocks first. Of those that come to the same the first is taken."""
    swaps: list[Swap] = []
    seen: set[str] = set()
    teacher: dict[tuple[int, int], Amounts] = {}
    for pairs in found:
        one = Swap(tuple(candidate for candidate, _ in pairs), {})
        students = {candidate.input: module for candidate, module in pairs}
        place, recipe = (one.first, one.end), one.members[0].recipe
        x = torch.empty(1, *chain.boundaries[one.first].shape[1:])
        if place not in teacher:
            teacher[place] = amounts_of(row_of(chain, *place), x)
        options = {name: value for name, value in recipe.options().items() if name not in SIZES}
        shapes = [[name, *one.shape] for module in students.values() for name, one in module.state_dict().items()]
        key = json.dumps([place, one.name, options, shapes])
        if key not in seen:
            seen.add(key)
            own, before = amounts_of(row_of(chain, *place, students), x), teacher[place]
            swaps.append(replace(one, amounts={name: own[name] - before[name] for name in own}))
    return sorted(swaps, key=lambda swap: (swap.first, len(swap.members) > 1, swap.end))


def row_of(chain: Chain, first: int, end: int, students: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """Return blocks one after another as a module, the students in the places of theirs."""
    known = students or {}
    modules = [known[block] if block in known else chain.block_module(block) for block in range(first, end)]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def amounts_of(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Return what a network, or a part of one, has of everything that may be budgeted, for one image like `x`. The
    network has no values any more afterwards: FLOPs are counted on the meta device."""
    params = sum(parameter.numel() for parameter in network.parameters())
    size = weight_bytes(network)
    imagined = network.eval().to("meta")
    with torch.no_grad():
        flops = count_flops(lambda: imagined(torch.empty_like(x, device="meta", dtype=torch.float32)))
    return {"params": float(params), "flops": float(flops), "bytes": size}


def weight_bytes(network: nn.Module) -> float:
    """Return the bytes of a network's parameters and buffers."""
    return float(sum(tensor.nbytes for tensor in each_once(network.state_dict()).values()))
