"""All that the blocks of a student may become under budgets, and what each would have of every amount."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain, copied
from distill.config.schema import JobConfig
from distill.errors import ConfigError
from distill.job.activations import Activations
from distill.job.blocks import (
    Blocks,
    at_work,
    chosen_names,
    cut_chain,
    refuse_strangers,
    remarks_on,
    sample_images,
)
from distill.job.call_memory import MEMORY, with_peaks
from distill.job.candidates import find_crossing, try_out, try_out_streams
from distill.job.recipes import Named, candidates_of
from distill.job.swaps import Amounts, Swap, Units, amounts_of, place_name, row_of, swaps_of
from distill.recipes import Stream
from distill.search.budgets import shown
from distill.search.choice import Option, choose, least, totals

KEEP = "keep"


@dataclass(frozen=True)
class Pool:
    """The cut teacher with what it has of every amount, and all swaps in the order of blocks. `kept` are the peaks (see
    Swap) of blocks that stay, where there are any."""

    chain: Chain
    swaps: tuple[Swap, ...]
    teacher: Amounts
    remarks: tuple[str, ...]
    kept: Mapping[int, Amounts] = field(default_factory=dict)

    @property
    def blocks(self) -> list[int]:
        """The blocks that may change."""
        return sorted(set().union(*(swap.covers for swap in self.swaps)))

    def alone(self, number: int) -> Blocks:
        """Return the teacher with one swap alone."""
        return Blocks(self.chain, {one.input: one for one in self.swaps[number].members})

    def with_swaps(self, numbers: Iterable[int]) -> Blocks:
        """Return the student of these swaps, one a block at most."""
        members = (one for number in numbers for one in self.swaps[number].members)
        return Blocks(self.chain, {one.input: one for one in sorted(members, key=lambda one: one.input)}, self.remarks)

    def with_units(self, units: Mapping[int, Units]) -> Pool:
        """Return the pool with the units that stay of the streams of swaps, by the swaps' numbers."""
        swaps = (swap.with_units(units[number]) if number in units else swap for number, swap in enumerate(self.swaps))
        return replace(self, swaps=tuple(swaps))

    def row(self, number: int, students: Mapping[int, nn.Module]) -> nn.Module:
        """Return what stands in the place of a swap, block after block, for the modules of its members by block."""
        return row_of(self.chain, self.swaps[number].first, self.swaps[number].end, students)

    def module(self, number: int, state: Mapping[str, Tensor]) -> nn.Module:
        """Return what stands in the place of a swap, with the weights of all its members."""
        alone = self.alone(number)
        return self.row(number, alone.students(parted(alone, state)))

    def place_name(self, number: int) -> str:
        """Return what the block of a swap is called, or the first and the last of several."""
        return place_name(self.chain, self.swaps[number].first, self.swaps[number].end)

    def options(self, losses: Mapping[int, float]) -> list[Option]:
        """Return what may be chosen for all blocks: the swaps that have a loss, by number, then to keep each block."""
        return [
            *(self._option(number, loss) for number, loss in losses.items()),
            *(self._keeping(block) for block in self.blocks),
        ]

    def _option(self, number: int, loss: float) -> Option:
        swap = self.swaps[number]
        return Option(str(number), frozenset(swap.covers), loss, swap.amounts, swap.trains, swap.peaks)

    def _keeping(self, block: int) -> Option:
        none = dict.fromkeys(self.teacher, 0.0)
        return Option(KEEP, frozenset({block}), 0.0, none, trains=False, peaks=self.kept.get(block, {}))

    def more(self, number: int) -> dict[str, float]:
        """Return how much more than the teacher the network has of every amount with one swap alone."""
        swap = self.swaps[number]
        options = [
            self._option(number, 0.0),
            *(self._keeping(block) for block in self.blocks if block not in swap.covers),
        ]
        return totals(options, range(len(options)))[1]

    @property
    def example(self) -> Blocks:
        """The student of which every block is as large as it may be, and trains: for what is tried before a choice."""
        return self.with_swaps(_largest(self))

    def with_amounts(self, name: str, teacher: float, more: Sequence[float]) -> Pool:
        """Return the pool with one more amount: what the teacher has of it, and how much more with every swap."""
        swaps = [replace(swap, amounts={**swap.amounts, name: one}) for swap, one in zip(self.swaps, more, strict=True)]
        return replace(self, swaps=tuple(swaps), teacher={**self.teacher, name: teacher})

    def limits(self, config: JobConfig) -> dict[str, float]:
        """Return by how much more than the teacher's every budgeted amount that is known may be (a negative number:
        less)."""
        budgets = config.search.budget.given()
        return {
            name: budget.limit(self.teacher[name]) - self.teacher[name]
            for name, budget in budgets.items()
            if name in self.teacher
        }


def find_pool(config: JobConfig, image_shape: tuple[int, ...], teacher: nn.Module, device: torch.device) -> Pool:
    """Cut the teacher and try all candidates on a sample. Raises ConfigError where there are none, or where no choice
    of them is within the budgets."""
    chain = cut_chain(config, image_shape, teacher, device)
    names = [block.name for block in chain.blocks]
    asked, chosen = candidates_of(config, names), chosen_names(config, names)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        images = sample_images(image_shape, device)
        tried = {block.index: asked[block.name] for block in chain.blocks if block.name in chosen}
        crossing, kept = find_crossing(chain, images, (one.recipe for several in tried.values() for one in several))
        alone = try_out(chain, teacher, images, _of_one_block(tried), first_layer=config.student.first_layer)
        streams = try_out_streams(chain, crossing, tried) if crossing is not None else ()
        found = itertools.chain(([one] for one, _ in alone if one is not None), streams)
        activations = Activations.of(config, chain)
        swaps = tuple(swaps_of(chain, found if activations is None else map(activations.pairs, found)))
        if activations is not None:
            members = [one for swap in swaps for one in swap.members]
            activations.refuse_none(members)
            kept |= activations.kept(members)
        without = {*tried} - {block for swap in swaps for block in swap.covers}
        remarks = (*_remarks(chain, without), *remarks_on(kept))
        pool = Pool(at_work(config, chain, device), swaps, amounts_of(copied(teacher), images[:1]), remarks)
        pool = _with_memory(config, pool)
        refuse_unreachable(config, pool)
        refuse_strangers(teacher, chain, images, pool.example.candidates)
    return pool


def _with_memory(config: JobConfig, pool: Pool) -> Pool:
    """Return the pool with the memory of a call, where that has a budget."""
    asked = config.search.budget.memory
    if asked is None:
        return pool
    if not pool.chain.divisible:
        allowed = "null for a network that is run through hooks: what is alive around its blocks cannot be told"
        raise ConfigError(f"search.budget.{MEMORY}", asked, allowed)
    swaps, kept, highest = with_peaks(pool.chain, pool.swaps, config.deploy.batch)
    return replace(pool, swaps=swaps, kept=kept, teacher={**pool.teacher, MEMORY: pool.teacher["bytes"] + highest})


def _of_one_block(asked: Mapping[int, Sequence[Named]]) -> dict[int, list[Named]]:
    """Return the recipes of single blocks."""
    return {block: [one for one in several if not isinstance(one.recipe, Stream)] for block, several in asked.items()}


def _remarks(chain: Chain, without: Iterable[int]) -> Iterator[str]:
    if chain.remark:
        yield chain.remark
    if names := [chain.blocks[block].name for block in sorted(without)]:
        yield f"without candidates, they stay: {', '.join(names)}"


def refuse_unreachable(config: JobConfig, pool: Pool) -> None:
    """Raise ConfigError unless some choice of candidates, which is not the teacher, is within the budgets."""
    search = config.search
    if not any(swap.trains for swap in pool.swaps):
        names = ", ".join(block.name for block in pool.chain.blocks)
        allowed = f"candidates of which one at least makes a block cheaper and has weights to train (blocks: {names})"
        raise ConfigError("search.candidates", search.candidates, allowed)
    options, limits = pool.options(dict.fromkeys(range(len(pool.swaps)), 0.0)), pool.limits(config)
    if len(limits) == len(search.budget.given()) and all(limit >= 0 for limit in limits.values()):
        name = next(iter(limits))
        allowed = f"less than the teacher's own {shown(name, pool.teacher[name])}, or there is nothing to choose"
        raise ConfigError(f"search.budget.{name}", getattr(search.budget, name), allowed)
    for name, limit in limits.items():
        lowest = least(options, name).amounts[name]
        if lowest > limit:
            allowed = f"at least {shown(name, pool.teacher[name] + lowest)}: the least that these candidates come to"
            raise ConfigError(f"search.budget.{name}", getattr(search.budget, name), allowed)
    if choose(options, limits) is None:
        given = {name: getattr(search.budget, name) for name in limits}
        raise ConfigError("search.budget", given, "budgets that some choice of the candidates keeps to together")


def _largest(pool: Pool) -> list[int]:
    """Return for every block the swap that leaves most of it and trains, of all that do: one student to try out. Swaps
    of several blocks stand where none of these has one of its own."""
    found: list[int] = []
    trains = [number for number, swap in enumerate(pool.swaps) if swap.trains]
    for number in sorted(trains, key=lambda n: (len(pool.swaps[n].members), -pool.swaps[n].amounts["params"])):
        if not any(set(pool.swaps[number].covers) & set(pool.swaps[other].covers) for other in found):
            found.append(number)
    return found


def parted(blocks: Blocks, state: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return the weights of several candidates, which are one state dict, by the candidate's number."""
    if len(blocks.candidates) == 1:  # all are its own: nothing has to be built to tell
        return {number: dict(state) for number in blocks.candidates}
    names = {number: blocks.build(number).state_dict() for number in blocks.candidates}
    return {number: {name: state[name] for name in own if name in state} for number, own in names.items()}
