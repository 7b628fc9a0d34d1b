"""The cut teacher and what students replace in it, tried on a sample before anything is computed or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.chain import Chain
from distill.blocks.cut import Granularity, cut
from distill.config.choices import Amp
from distill.config.schema import JobConfig
from distill.cuda.graphs import cuda_capture
from distill.cuda.lanes import Lane
from distill.errors import ConfigError, one_of
from distill.job.activations import Activations
from distill.job.candidates import Candidate, propose, propose_streams
from distill.job.recipes import recipe_of, recipes_of
from distill.planning.unit import Proposal, Unit, number_units
from distill.profiling.statistics import InputStatistics
from distill.recipes import Changes, Kept, Recipe, Stream
from distill.storage.aliases import load_state
from distill.student.assemble import assemble, in_a_row
from distill.training.graphed_teacher import GraphedChain

SHOWN = 4  # paths in a line about many


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
        return self.candidates[number].built(self.chain, generator, statistics)

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
    chain = cut_chain(config, image_shape, teacher, device)
    names = [block.name for block in chain.blocks]
    recipes, chosen = recipes_of(config, names), chosen_names(config, names)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        images = sample_images(image_shape, device)
        asked = {block.index: recipes[block.name] for block in chain.blocks if block.name in chosen}
        found, kept = propose_streams(chain, images, asked)
        alone = {block: [one] for block, one in asked.items() if not isinstance(one.recipe, Stream)}
        others, left = propose(chain, teacher, images, alone, first_layer=config.student.first_layer)
        candidates = {one.input: one for one in sorted([*found, *others], key=lambda one: one.input)}
        kept |= left | other_convolutions(teacher)
        activations = Activations.of(config, chain)
        if activations is not None and candidates:
            candidates = {block: activations.candidate(one) for block, one in candidates.items()}
            kept |= activations.kept(candidates.values())
            activations.refuse_none(candidates.values())
        if not any(one.trains for one in candidates.values()):
            raise _nothing_to_replace(config, chain, kept)
        if device.type != "meta":
            refuse_strangers(teacher, chain, images, candidates)
    remarks = [*([chain.remark] if chain.remark else []), *remarks_on(kept)]
    return Blocks(at_work(config, chain, device), candidates, tuple(remarks))


def cut_chain(config: JobConfig, image_shape: tuple[int, ...], teacher: nn.Module, device: torch.device) -> Chain:
    """Cut the teacher for images of that shape (channels, height, width)."""
    sample = torch.zeros(config.data.batch_size, *image_shape, device=device)
    return cut(
        teacher,
        sample.to(memory_format=torch.channels_last),
        granularity=Granularity[config.blocks.granularity.name],
        modules=config.blocks.modules,
    )


def sample_images(image_shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the two images that students are tried on."""
    return torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)


def at_work(config: JobConfig, chain: Chain, device: torch.device) -> Chain:
    """Return the chain in the precision, and with the graphs, in which the teacher will run."""
    if config.teacher.amp is Amp.bf16:
        chain = Bf16Chain(chain)
    return (
        GraphedChain(chain, cuda_capture(Lane(device)))
        if device.type == "cuda" and config.distill.cuda_graphs
        else chain
    )


def chosen_names(config: JobConfig, names: Sequence[str]) -> set[str]:
    """Return the names of the blocks that get a student. Raises ConfigError where a pattern names no block."""
    chosen = matching("blocks.include", config.blocks.include, names)
    return chosen - matching("blocks.exclude", config.blocks.exclude, names)


def refuse_strangers(teacher: nn.Module, chain: Chain, images: Tensor, candidates: Mapping[int, Candidate]) -> None:
    """Raise unless the student network, put together, gives what its blocks give in a row."""

    def fits(blocks: Sequence[int]) -> bool:
        chosen = {block: candidates[block] for block in blocks}
        students = {k: one.built(chain) for k, one in chosen.items()}
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


def other_convolutions(teacher: nn.Module) -> Kept:
    """Return the layers that convolve, with kernels larger than one pixel, but are no nn.Conv2d."""
    kinds = nn.modules.conv._ConvNd
    return {
        path: f"a {type(module).__name__}"
        for path, module in teacher.named_modules()
        if isinstance(module, kinds) and not isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    }


def remarks_on(kept: Kept) -> Iterator[str]:
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
    return ConfigError("student.recipe", config.student.recipe, "; ".join([allowed, *remarks_on(kept)]))


def matching(setting: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the names of blocks that some pattern matches. Raises ConfigError on `setting` where one matches none."""
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ConfigError(setting, pattern, f"a pattern that matches a block: {one_of(names, pattern)}")
        found |= matches
    return found
