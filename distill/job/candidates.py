"""What a block may become: a recipe's proposals for it, tried on a sample before anything is computed or written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.blocks.tracing import UntraceableError
from distill.blocks.whole import whole_modules
from distill.job.recipes import Named
from distill.profiling.statistics import InputStatistics
from distill.recipes import Changes, Kept, Recipe, Stream, View
from distill.recipes.activations import made_student
from distill.recipes.crossing import Crossing


@dataclass(frozen=True)
class Candidate:
    """A student of a block: its recipe by name, and what that changes. It stands between two boundaries."""

    name: str
    recipe: Recipe
    changes: Changes
    input: int
    target: int
    trains: bool = True  # a student without weights, such as a shortcut, is put in its place and never planned
    label: str = ""  # what it is called among several for its block

    def built(
        self,
        chain: Chain,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        """Return its module: with a generator its first weights, without one weights that mean nothing."""
        return made_student(self.recipe, chain.block_module(self.input), self.changes, generator, statistics)

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that rebuilds it in a network of the architecture, as JSON values."""
        return {"recipe": self.name, "options": self.recipe.options(), "changes": self.changes}


def propose(
    chain: Chain, teacher: nn.Module, images: Tensor, asked: Mapping[int, Sequence[Named]], *, first_layer: bool
) -> tuple[list[Candidate], Kept]:
    """Return what recipes would change in their blocks, as try_out() yields it, and why other things stay."""
    candidates: list[Candidate] = []
    kept: Kept = {}
    for found, left in try_out(chain, teacher, images, asked, first_layer=first_layer):
        kept |= left
        candidates += [found[0]] if found is not None else []
    return candidates, kept


@torch.no_grad()
def try_out(
    chain: Chain, teacher: nn.Module, images: Tensor, asked: Mapping[int, Sequence[Named]], *, first_layer: bool
) -> Iterator[tuple[tuple[Candidate, nn.Module] | None, Kept]]:
    """Yield for every recipe the candidate that it makes of its block and that one's module, whose weights mean nothing
    (None where it changes nothing), and why other things stay: in the blocks' order, and of a block in that asked for.
    `first_layer`: whether the network's first convolution may change too."""
    first = None if first_layer else chain.first_convolution
    whole = whole_modules(teacher, chain, images)
    for block, inputs in _inputs(chain, images, [block for block in asked if chain.blocks[block].modules]):
        facts = chain.blocks[block]
        for one in asked[block]:
            view = View(
                name=facts.name,
                module=chain.block_module(block),
                sample=inputs,
                convolutions=facts.convolutions,
                changeable=frozenset(facts.modules) - {first},
                path=whole.get(block),
            )
            with torch.enable_grad():
                changes, left = one.recipe.propose(view)
            if changes is None:
                yield None, left
                continue
            found = Candidate(one.name, one.recipe, changes, block, block + 1, label=one.label)
            student = found.built(chain)
            trains = any(True for _ in student.parameters())
            yield (replace(found, trains=trains), student), left


@torch.no_grad()
def propose_streams(chain: Chain, images: Tensor, asked: Mapping[int, Named]) -> tuple[list[Candidate], Kept]:
    """Return what changes in the blocks that are asked for narrower streams, which is found for all of them at once."""
    recipes = {block: one.recipe for block, one in asked.items() if isinstance(one.recipe, Stream)}
    crossing, kept = find_crossing(chain, images, recipes.values())
    if crossing is None:
        return [], kept
    with torch.enable_grad():
        changed, kept = crossing.narrowed(recipes)
    return [
        Candidate(asked[block].name, recipes[block], changes, block, block + 1) for block, changes in changed.items()
    ], kept


def find_crossing(chain: Chain, images: Tensor, recipes: Iterable[Recipe]) -> tuple[Crossing | None, Kept]:
    """Return the streams of the network, where one of these recipes makes them narrower and they can be found; else
    None, and why not."""
    if not any(isinstance(recipe, Stream) for recipe in recipes):
        return None, {}
    if not chain.divisible:
        return None, {"streams": "the network is run through hooks, not block by block"}
    modules = [chain.block_module(block).eval() for block in range(len(chain.blocks))]
    try:
        with torch.enable_grad():
            return Crossing.of(modules, images.float()), {}
    except UntraceableError as error:
        reason = str(error).partition("\n")[0]
        return None, {"streams": f"their channels cannot be followed: {reason}"}


@torch.no_grad()
def try_out_streams(
    chain: Chain, crossing: Crossing, asked: Mapping[int, Sequence[Named]]
) -> Iterator[list[tuple[Candidate, nn.Module]]]:
    """Yield for every recipe of narrower streams, and for every stream alone and neighbours together, the candidates
    that belong together with their modules, whose weights mean nothing; of streams that stay, nothing."""
    wanted: dict[Named, list[int]] = {}
    for block, several in asked.items():
        for one in several:
            if isinstance(one.recipe, Stream):
                wanted.setdefault(one, []).append(block)
    for one, blocks in wanted.items():
        recipes = {block: one.recipe for block in blocks if isinstance(one.recipe, Stream)}
        for run in crossing.runs():
            with torch.enable_grad():
                changed, _ = crossing.narrowed(recipes, [number for numbers in run.values() for number in numbers])
            narrower = {number for own in changed.values() for number in own["streams"]}
            if any(narrower.isdisjoint(numbers) for numbers in run.values()):
                continue  # one of them stays: without it, it is another run
            label = f"{one.label} of {' to '.join(dict.fromkeys([next(iter(run)), next(reversed(run))]))}"
            members = [Candidate(one.name, one.recipe, own, at, at + 1, label=label) for at, own in changed.items()]
            modules = [each.built(chain) for each in members]
            yield list(zip(members, modules, strict=True))


def _inputs(chain: Chain, images: Tensor, blocks: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks and their inputs, few of which are in memory at a time where the chain can be divided."""
    if not chain.divisible:
        found = chain.run(images, last=max(blocks, default=0), keep=blocks)
        yield from found.items()
        return
    x, at = images, 0
    for block in blocks:
        x, at = chain.run(x, first=at, last=block, keep=[block])[block], block
        yield block, x
