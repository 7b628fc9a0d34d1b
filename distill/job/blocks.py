"""The cut teacher and what students replace in it, tried on a sample before anything is computed or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.cut import Chain, Granularity, cut
from distill.config.choices import Amp
from distill.config.schema import JobConfig
from distill.cuda.graphs import cuda_capture
from distill.cuda.lanes import Lane
from distill.errors import ConfigError, one_of
from distill.planning.unit import Proposal, Unit, number_units
from distill.recipes import RECIPES, Kept, Recipe, replace_convolutions, select
from distill.storage.aliases import load_state
from distill.student.assemble import assemble, in_a_row
from distill.training.graphed_teacher import GraphedChain

SHOWN = 4  # paths in a line about many


@dataclass(frozen=True)
class Blocks:
    """The cut teacher, the recipe, for every block that gets a student the convolutions to replace in it, and what the
    user should know of those that are not replaced."""

    chain: Chain
    recipe: Recipe
    replaced: dict[int, tuple[str, ...]]
    remarks: tuple[str, ...] = ()

    @cached_property
    def units(self) -> dict[int, Unit]:
        """What is planned and trained, by number: a student for every block in which something is replaced."""
        proposals = [Proposal(type(self.recipe).__name__, block, block + 1) for block in self.replaced]
        return {unit.number: unit for unit in number_units(proposals, [block.name for block in self.chain.blocks])}

    @property
    def replaced_paths(self) -> list[str]:
        """The qualified paths of all replaced convolutions, in the network's order."""
        return [path for block in sorted(self.replaced) for path in self.replaced[block]]

    def student(self, block: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return the student of a block with its trained weights."""
        module = self.chain.block_module(block)
        replace_convolutions(module, self.replaced[block], self.recipe)
        load_state(module, weights)
        return module


def cut_blocks(config: JobConfig, image_shape: tuple[int, ...], teacher: nn.Module, device: torch.device) -> Blocks:
    """Cut the teacher for images of that shape (channels, height, width) and choose the blocks that get students.

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
    recipe = make_recipe(config)
    chosen = _chosen(config, [block.name for block in chain.blocks])
    paths = {
        block.index: _wanted(config, chain, block.index, teacher) for block in chain.blocks if block.name in chosen
    }
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
        replaced, kept = _select(chain, images, paths, recipe)
        kept |= _other_convolutions(teacher)
        if not replaced:
            raise _nothing_to_replace(config, chain, kept)
        if device.type != "meta":
            _refuse_strangers(teacher, chain, images, replaced, recipe)
    remarks = [*([chain.remark] if chain.remark else []), *_remarks(kept)]
    return Blocks(_at_work(config, chain, device), recipe, replaced, tuple(remarks))


def make_recipe(config: JobConfig) -> Recipe:
    """Return the configured recipe."""
    return RECIPES[config.student.recipe.name](rank=config.student.rank, init=config.student.init.name)


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


def _wanted(config: JobConfig, chain: Chain, block: int, teacher: nn.Module) -> list[str]:
    """Return the convolutions of a block with a kernel larger than one pixel, the network's first aside."""
    first = None if config.student.first_layer else chain.first_convolution
    return [
        path
        for path in chain.blocks[block].convolutions
        if path != first and max(teacher.get_submodule(path).kernel_size) > 1  # type: ignore[arg-type]
    ]


@torch.no_grad()
def _select(
    chain: Chain, images: Tensor, paths: Mapping[int, Sequence[str]], recipe: Recipe
) -> tuple[dict[int, tuple[str, ...]], Kept]:
    """Return what is replaced in each block, and why the other convolutions are not."""
    replaced: dict[int, tuple[str, ...]] = {}
    kept: Kept = {}
    for block, inputs in _inputs(chain, images, [block for block, wanted in paths.items() if wanted]):
        with torch.enable_grad():
            taken, left = select(chain.block_module(block), inputs, paths[block], recipe)
        kept |= left
        if taken:
            replaced[block] = taken
    return replaced, kept


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


def _refuse_strangers(
    teacher: nn.Module, chain: Chain, images: Tensor, replaced: Mapping[int, tuple[str, ...]], recipe: Recipe
) -> None:
    """Raise unless the student network, put together, gives what its blocks give in a row."""

    def fits(blocks: Sequence[int]) -> bool:
        students = {block: chain.block_module(block) for block in blocks}
        for block, student in students.items():
            replace_convolutions(student, replaced[block], recipe)
        weights = [student.state_dict() for student in students.values()]
        paths = [path for block in blocks for path in replaced[block]]
        return in_a_row(assemble(teacher, replaced=paths, recipe=recipe, blocks=weights), chain, students, images)

    if fits(list(replaced)):
        return
    strangers = [block for block in replaced if not fits([block])] or list(replaced)
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
    """Yield a line for every reason why convolutions stay as they are."""
    for reason, paths in groupby(sorted(kept, key=lambda path: kept[path]), key=lambda path: kept[path]):
        yield f"not replaced: {_listed(list(paths))} ({reason})"


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more


def _nothing_to_replace(config: JobConfig, chain: Chain, kept: Kept) -> ConfigError:
    names = [block.name for block in chain.blocks]
    allowed = (
        f"a network with dense convolutions larger than 1 x 1 in the chosen blocks that it makes cheaper; "
        f"{config.teacher.name} has none (its blocks: {', '.join(names)})"
    )
    return ConfigError("student.recipe", config.student.recipe.name, "; ".join([allowed, *_remarks(kept)]))


def _matching(setting: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ConfigError(setting, pattern, f"a pattern that matches a block: {one_of(names, pattern)}")
        found |= matches
    return found
