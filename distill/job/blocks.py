"""The cut teacher and what students replace in it, tried on a sample before anything is computed or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.chain import Chain
from distill.blocks.cut import Granularity, cut
from distill.blocks.whole import whole_modules
from distill.config.choices import Amp
from distill.config.schema import JobConfig
from distill.cuda.graphs import cuda_capture
from distill.cuda.lanes import Lane
from distill.errors import ConfigError, one_of
from distill.job.recipes import Named, recipe_of, recipes_of
from distill.planning.unit import Proposal, Unit, number_units
from distill.profiling.statistics import InputStatistics
from distill.recipes import Changes, Kept, Recipe, Stream, View
from distill.recipes.stream import find_streams
from distill.storage.aliases import load_state
from distill.student.assemble import assemble, in_a_row
from distill.training.graphed_teacher import GraphedChain

SHOWN = 4  # paths in a line about many


@dataclass(frozen=True)
class Candidate:
    """A student of a block: its recipe by name, and what that changes. It stands between two boundaries."""

    name: str
    recipe: Recipe
    changes: Changes
    input: int
    target: int
    trains: bool = True  # a student without weights, such as a shortcut, is put in its place and never planned

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that rebuilds it in a network of the architecture, as JSON values."""
        return {"recipe": self.name, "options": self.recipe.options(), "changes": self.changes}


@dataclass(frozen=True)
class Blocks:
    """The cut teacher, the candidates by number, and what the user should know of what stays."""

    chain: Chain
    candidates: dict[int, Candidate]
    remarks: tuple[str, ...] = ()

    @cached_property
    def units(self) -> dict[int, Unit]:
        """What is planned and trained, by number: candidates that have weights."""
        proposals = [Proposal(one.name, one.input, one.target) for one in self.candidates.values()]
        units = number_units(proposals, [block.name for block in self.chain.blocks])
        assert [unit.number for unit in units] == list(self.candidates)
        found = {}
        for unit in units:
            one = self.candidates[unit.number]
            if one.trains:
                reads, gives = one.recipe.ends(one.changes)
                found[unit.number] = replace(unit, reads=reads, gives=gives)
        return found

    @property
    def replaced_paths(self) -> list[str]:
        """The qualified paths of all replaced modules, in the network's order."""
        return [path for one in self.in_order for path in one.recipe.paths(one.changes)]

    @property
    def changed(self) -> list[tuple[Recipe, Changes]]:
        """What is changed by which recipe, in the network's order."""
        return [(one.recipe, one.changes) for one in self.in_order]

    @property
    def in_order(self) -> list[Candidate]:
        """The candidates as they follow one another in the network."""
        return sorted(self.candidates.values(), key=lambda one: one.input)

    def build(
        self,
        number: int,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        """Return a unit's module: with a generator its first weights, without one weights that mean nothing."""
        one = self.candidates[number]
        return one.recipe.student(self.chain.block_module(one.input), one.changes, generator, statistics)

    def teacher_module(self, number: int) -> nn.Module:
        """Return what a unit stands for: a copy of the teacher's blocks between its boundaries."""
        one = self.candidates[number]
        return nn.Sequential(*(self.chain.block_module(block) for block in range(one.input, one.target)))

    def students(self, weights: Mapping[int, Mapping[str, Tensor]]) -> dict[int, nn.Module]:
        """Return the modules of all candidates with their weights by number, by the block for which each stands."""
        return {one.input: self.student(number, weights.get(number, {})) for number, one in self.candidates.items()}

    def student(self, number: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return a unit's module with its trained weights."""
        module = self.build(number)
        load_state(module, weights)
        return module


def cut_blocks(config: JobConfig, image_shape: tuple[int, ...], teacher: nn.Module, device: torch.device) -> Blocks:
    """Cut the teacher for images of that shape (channels, height, width); let recipes change the chosen blocks.

    Raises ConfigError where patterns name no block, where the recipe finds nothing to replace, or where the student
    would not be its blocks.
    """
    sample = torch.zeros(config.data.batch_size, *image_shape, device=device)
    chain = cut(
        teacher,
        sample.to(memory_format=torch.channels_last),
        granularity=Granularity[config.blocks.granularity.name],
        modules=config.blocks.modules,
    )
    names = [block.name for block in chain.blocks]
    recipes, chosen = recipes_of(config, names), _chosen(config, names)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
        asked = {block.index: recipes[block.name] for block in chain.blocks if block.name in chosen}
        candidates, kept = _propose(config, chain, teacher, images, asked)
        kept |= _other_convolutions(teacher)
        if not any(one.trains for one in candidates.values()):
            raise _nothing_to_replace(config, chain, kept)
        if device.type != "meta":
            _refuse_strangers(teacher, chain, images, candidates)
    remarks = [*([chain.remark] if chain.remark else []), *_remarks(kept)]
    return Blocks(_at_work(config, chain, device), candidates, tuple(remarks))


def _at_work(config: JobConfig, chain: Chain, device: torch.device) -> Chain:
    """Return the chain in the precision, and with the graphs, in which the teacher will run."""
    if config.teacher.amp is Amp.bf16:
        chain = Bf16Chain(chain)
    return (
        GraphedChain(chain, cuda_capture(Lane(device)))
        if device.type == "cuda" and config.distill.cuda_graphs
        else chain
    )


def _chosen(config: JobConfig, names: Sequence[str]) -> set[str]:
    chosen = _matching("blocks.include", config.blocks.include, names)
    return chosen - _matching("blocks.exclude", config.blocks.exclude, names)


@torch.no_grad()
def _propose(
    config: JobConfig, chain: Chain, teacher: nn.Module, images: Tensor, asked: Mapping[int, Named]
) -> tuple[dict[int, Candidate], Kept]:
    """Return what every recipe would change in its block, and why other things stay."""
    candidates, kept = _propose_streams(chain, images, asked)
    asked = {block: one for block, one in asked.items() if not isinstance(one.recipe, Stream)}
    first = None if config.student.first_layer else chain.first_convolution
    whole = whole_modules(teacher, chain, images)
    for block, inputs in _inputs(chain, images, [block for block, one in asked.items() if chain.blocks[block].modules]):
        facts, one = chain.blocks[block], asked[block]
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
        kept |= left
        if changes is not None:
            student = one.recipe.student(chain.block_module(block), changes)
            trains = any(True for _ in student.parameters())
            candidates[block] = Candidate(one.name, one.recipe, changes, block, block + 1, trains)
    return dict(sorted(candidates.items())), kept


def _propose_streams(chain: Chain, images: Tensor, asked: Mapping[int, Named]) -> tuple[dict[int, Candidate], Kept]:
    """Return what changes in the blocks that are asked for narrower streams, which is found for all of them at once."""
    recipes = {block: one.recipe for block, one in asked.items() if isinstance(one.recipe, Stream)}
    if not recipes:
        return {}, {}
    if not chain.divisible:
        return {}, {"streams": "the network is run through hooks, not block by block"}
    modules = [chain.block_module(block).eval() for block in range(len(chain.blocks))]
    with torch.enable_grad():
        changed, kept = find_streams(modules, images.float(), recipes)
    return {
        block: Candidate(asked[block].name, recipes[block], changes, block, block + 1)
        for block, changes in changed.items()
    }, kept


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


def _refuse_strangers(teacher: nn.Module, chain: Chain, images: Tensor, candidates: Mapping[int, Candidate]) -> None:
    """Raise unless the student network, put together, gives what its blocks give in a row."""

    def fits(blocks: Sequence[int]) -> bool:
        chosen = {block: candidates[block] for block in blocks}
        students = {k: one.recipe.student(chain.block_module(k), one.changes) for k, one in chosen.items()}
        weights = [student.state_dict() for student in students.values()]
        changed = [(one.recipe, one.changes) for one in chosen.values()]
        return in_a_row(assemble(teacher, changed=changed, blocks=weights), chain, students, images)

    if fits(list(candidates)):
        return
    streams = [block for block, one in candidates.items() if isinstance(one.recipe, Stream)]  # only fit together
    apart = [streams, *([block] for block in candidates if block not in streams)]
    strangers = [block for blocks in apart if not fits(blocks) for block in blocks] or list(candidates)
    names = [chain.blocks[block].name for block in strangers]
    allowed = (
        f"also {', '.join(names)}: put together, the student is not its blocks in a row, because the network's code "
        "reaches a layer that is replaced in another way than by calling it (a plain list of layers, its weight)"
    )
    raise ConfigError("blocks.exclude", [], allowed)


def _other_convolutions(teacher: nn.Module) -> Kept:
    """Return the layers that convolve, with kernels larger than one pixel, but are no nn.Conv2d."""
    kinds = nn.modules.conv._ConvNd
    return {
        path: f"a {type(module).__name__}"
        for path, module in teacher.named_modules()
        if isinstance(module, kinds) and not isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    }


def _remarks(kept: Kept) -> Iterator[str]:
    """Yield a line for every reason why things stay as they are."""
    for reason, paths in groupby(sorted(kept, key=lambda path: kept[path]), key=lambda path: kept[path]):
        yield f"not replaced: {_listed(list(paths))} ({reason})"


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more


def _nothing_to_replace(config: JobConfig, chain: Chain, kept: Kept) -> ConfigError:
    names = [block.name for block in chain.blocks]
    what = recipe_of(config).recipe.replaces
    allowed = (
        f"a network with {what} in the chosen blocks that it makes cheaper; "
        f"{config.teacher.name} has none (its blocks: {', '.join(names)})"
    )
    return ConfigError("student.recipe", config.student.recipe, "; ".join([allowed, *_remarks(kept)]))


def _matching(setting: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ConfigError(setting, pattern, f"a pattern that matches a block: {one_of(names, pattern)}")
        found |= matches
    return found
