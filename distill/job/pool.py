"""All that the blocks of a student may become under budgets, and what each would have of every amount."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain, copied
from distill.config.schema import JobConfig
from distill.errors import ConfigError
from distill.job.blocks import (
    Blocks,
    at_work,
    chosen_names,
    cut_chain,
    refuse_strangers,
    sample_images,
)
from distill.job.candidates import Candidate, try_out
from distill.job.recipes import candidates_of
from distill.profiling.block_costs import count_flops
from distill.search.budgets import shown
from distill.search.choice import Option, choose, least
from distill.storage.aliases import each_once

KEEP = "keep"
SIZES = ("ratio", "rank", "energy", "align")  # options that only say how large something is, and may come to the same

Amounts = Mapping[str, float]


@dataclass(frozen=True)
class Swap:
    """A candidate in the place of its block, and how much more than the teacher the network has of every amount with it
    (less: a negative number)."""

    candidate: Candidate
    amounts: Amounts

    @property
    def block(self) -> int:
        return self.candidate.input


@dataclass(frozen=True)
class Pool:
    """The cut teacher with what it has of every amount, and all swaps in the order of blocks."""

    chain: Chain
    swaps: tuple[Swap, ...]
    teacher: Amounts
    remarks: tuple[str, ...]

    @property
    def blocks(self) -> list[int]:
        """The blocks that may change."""
        return sorted({swap.block for swap in self.swaps})

    def alone(self, number: int) -> Blocks:
        """Return the teacher with one swap alone."""
        one = self.swaps[number].candidate
        return Blocks(self.chain, {one.input: one})

    def with_swaps(self, numbers: Sequence[int]) -> Blocks:
        """Return the student of these swaps, one a block at most."""
        candidates = {self.swaps[number].block: self.swaps[number].candidate for number in sorted(numbers)}
        return Blocks(self.chain, candidates, self.remarks)

    def options(self, losses: Mapping[int, float]) -> list[Option]:
        """Return what may be chosen for all blocks: the swaps that have a loss, by number, then to keep each block."""
        kept = dict.fromkeys(self.teacher, 0.0)
        return [
            *(self._option(number, loss) for number, loss in losses.items()),
            *(Option(KEEP, frozenset({block}), 0.0, kept, trains=False) for block in self.blocks),
        ]

    def _option(self, number: int, loss: float) -> Option:
        swap = self.swaps[number]
        return Option(str(number), frozenset({swap.block}), loss, swap.amounts, swap.candidate.trains)

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
        found = try_out(chain, teacher, images, tried, first_layer=config.student.first_layer)
        swaps = tuple(_swaps(chain, (one for one, _ in found if one is not None)))
        remarks = tuple(_remarks(chain, {*tried} - {swap.block for swap in swaps}))
        pool = Pool(at_work(config, chain, device), swaps, amounts_of(copied(teacher), images[:1]), remarks)
        refuse_unreachable(config, pool)
        refuse_strangers(teacher, chain, images, pool.example.candidates)
    return pool


def amounts_of(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Return what a network, or a part of one, has of everything that may be budgeted, for one image like `x`. The
    network has no values any more afterwards: FLOPs are counted on the meta device."""
    params = sum(parameter.numel() for parameter in network.parameters())
    size = sum(tensor.nbytes for tensor in each_once(network.state_dict()).values())
    imagined = network.eval().to("meta")
    with torch.no_grad():
        flops = count_flops(lambda: imagined(torch.empty_like(x, device="meta", dtype=torch.float32)))
    return {"params": float(params), "flops": float(flops), "bytes": float(size)}


def _swaps(chain: Chain, candidates: Iterable[tuple[Candidate, nn.Module]]) -> Iterator[Swap]:
    """Yield the candidates with their amounts; of those that come to the same the first."""
    seen: set[str] = set()
    teacher: dict[int, Amounts] = {}
    for one, module in candidates:
        x = torch.empty(1, *chain.boundaries[one.input].shape[1:])
        if one.input not in teacher:
            teacher[one.input] = amounts_of(chain.block_module(one.input), x)
        options = {name: value for name, value in one.recipe.options().items() if name not in SIZES}
        shapes = [[name, *tensor.shape] for name, tensor in module.state_dict().items()]
        key = json.dumps([one.input, one.name, options, shapes])
        if key not in seen:
            seen.add(key)
            own, before = amounts_of(module, x), teacher[one.input]
            yield Swap(one, {name: own[name] - before[name] for name in own})


def _remarks(chain: Chain, without: Iterable[int]) -> Iterator[str]:
    if chain.remark:
        yield chain.remark
    if names := [chain.blocks[block].name for block in sorted(without)]:
        yield f"without candidates, they stay: {', '.join(names)}"


def refuse_unreachable(config: JobConfig, pool: Pool) -> None:
    """Raise ConfigError unless some choice of candidates, which is not the teacher, is within the budgets."""
    search = config.search
    if not any(swap.candidate.trains for swap in pool.swaps):
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
    """Return for every block the swap that leaves most of it and trains, of all that do: one student to try out."""
    found: dict[int, int] = {}
    for number, swap in enumerate(pool.swaps):
        other = found.get(swap.block)
        if swap.candidate.trains and (other is None or swap.amounts["params"] > pool.swaps[other].amounts["params"]):
            found[swap.block] = number
    return list(found.values())
