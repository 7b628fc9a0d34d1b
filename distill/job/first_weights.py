"""The first weights of every unit, before any is trained: computed once, by all ranks side by side, and kept in first/
of the run directory, with their error on held-out images.

A unit's are a function of (seed, the unit's key, its recipe, the teacher, the first training batches) alone, whoever
computes them: the layers whose inputs a recipe asks about are watched by the rank that makes the unit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.blocks.chain import Chain
from distill.blocks.memory_format import to_channels_last
from distill.data import Dataset
from distill.data.addressing import derive_seed
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.job.reuse import TEACHER
from distill.observability.numbers import show_count
from distill.profiling.sketch import Sketch
from distill.profiling.statistics import WIDEST, InputStatistics, bytes_for, gather
from distill.recipes.heads import seen_heads
from distill.storage.checkpoint import contiguous
from distill.storage.files import write_bytes
from distill.student.assemble import recalibrate
from distill.student.refit import refit_block
from distill.training.channels import narrowed
from distill.training.losses import relative_error

log = logging.getLogger(__name__)

STAGE = "first_weights"
AT_A_TIME = 2**30  # bytes of covariances that are gathered in one pass of the teacher
IMAGES = 64  # of a batch are enough to judge a start by, or to fit one layer
SWEEPS = 4  # over layers that are summed: a shortcut and what is beside it

Statistics = Mapping[str, InputStatistics]


def first_file(number: int) -> str:
    """Return the name of the file of a unit's first weights within the run directory."""
    return f"first/{number:02d}.safetensors"


def first_weights(context: Context, number: int) -> dict[str, Tensor]:
    """Return a unit's first weights, on the CPU."""
    return load(context.run.read(first_file(number)))


def relative_errors(context: Context) -> dict[int, float]:
    """Return the relative errors of first weights on held-out images, by a unit's number; none in an earlier version's
    run."""
    result = context.run.result(STAGE) or {"relative_errors": {}}
    return {int(number): error for number, error in result["relative_errors"].items()}


def held_out_images(dataset: Dataset) -> Tensor:
    """Return the validation images by which units are judged."""
    return dataset.validation_batch(0).images[:IMAGES]


class OnTheWay:
    """Images on their way through the teacher, few at a time: asked for boundaries in rising order, no block runs
    twice."""

    def __init__(self, chain: Chain, images: Callable[[], Tensor]) -> None:
        self._chain, self._images = chain, images
        self._reached: tuple[int, Tensor] | None = None

    def at(self, boundary: int, *more: int) -> list[Tensor]:
        """Return what passes these boundaries, of which the first is the least."""
        first, x = self._reached or (0, self._images())
        if first > boundary or not self._chain.divisible:
            first, x = 0, self._images()
        asked = (boundary, *more)
        parts = [
            self._chain.run(part, first=first, last=max(asked), keep=set(asked)) for part in torch.split(x, IMAGES)
        ]
        found = [torch.cat([part[one] for part in parts]) if len(parts) > 1 else parts[0][one] for one in asked]
        self._reached = boundary, found[0]
        return found


def find_first_weights(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> dict[int, float]:
    """Compute the first weights of all units; return their relative errors on held-out images by number, the same on
    every rank. Every rank must call."""
    result = context.completed(STAGE)
    if result is None:
        result = _compute(context, dataset, teacher, blocks)
    return {int(number): error for number, error in result["relative_errors"].items()}


def _compute(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> dict[str, Any]:
    start = time.monotonic()
    makers = _makers(blocks, context.world_size)
    own = [number for number, rank in makers.items() if rank == context.rank]
    for number, known in _make_all(context, dataset, teacher, blocks, own):
        context.control.set(f"{STAGE}/{number}", known)
    if not context.leads:
        result: dict[str, Any] = context.control.wait(f"result/{STAGE}", peer=0, purpose="first weights")
        return result
    told = {
        number: context.control.wait(f"{STAGE}/{number}", peer=rank, purpose="first weights")
        for number, rank in makers.items()
    }
    errors = {number: one["relative_error"] for number, one in told.items()}
    sketched = {path: share for one in told.values() for path, share in one["sketched"].items()}
    watched = sorted({path for number in makers for path in _wanted(blocks, number)})
    batches = context.config.student.statistics_batches
    seconds = time.monotonic() - start
    result = {
        "relative_errors": errors,
        "layers": watched,
        "sketched": sketched,
        "batches": batches,
        "seconds": seconds,
    }
    context.run.complete(STAGE, result, made=[first_file(number) for number in makers], used=[TEACHER])
    if watched:
        layers, over = show_count(len(watched), "layer"), show_count(batches, "batch")
        context.say(f"statistics: of the inputs of {layers}, over {over}{_of_wide(sketched)}")
    _tell_unwatched(context, blocks)
    context.say(f"first weights of {show_count(len(makers), 'block')} in {seconds:.1f} s")
    context.control.set(f"result/{STAGE}", result)
    return result


def _tell_unwatched(context: Context, blocks: Blocks) -> None:
    if unseen := [path for one in blocks.candidates.values() for path in one.recipe.unwatched(one.changes)]:
        context.say(f"no statistics, weights alone: {', '.join(unseen)} (of inputs padded in own code)")


def _of_wide(sketched: Mapping[str, float]) -> str:
    """Return in words how much of the variance is known where there are too many inputs for their covariance."""
    if not sketched:
        return ""
    shares = ", ".join(f"{path} ({100 * share:.1f} % of its variance)" for path, share in sorted(sketched.items()))
    return f"; where more than {WIDEST:,}, by their largest directions: {shares}"


def take_first_weights(
    context: Context, dataset: Dataset, blocks: Blocks, weights: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Complete the stage with first weights that were made before, by a unit's number. Rank 0 calls this."""
    start = time.monotonic()
    held_out = OnTheWay(blocks.chain, lambda: held_out_images(dataset))
    errors = {}
    for number, state in sorted(weights.items()):
        write_bytes(context.run.path / first_file(number), save(contiguous(dict(state))))
        module = blocks.student(number, state)
        to_channels_last(module, context.device)
        errors[number] = error_of(blocks, number, module.eval(), held_out)
    watched = sorted({path for number in weights for path in _wanted(blocks, number)})
    batches, seconds = context.config.student.statistics_batches, time.monotonic() - start
    result = {"relative_errors": errors, "layers": watched, "batches": batches, "seconds": seconds}
    context.run.complete(STAGE, result, made=[first_file(number) for number in errors], used=[TEACHER])
    _tell_unwatched(context, blocks)


def _makers(blocks: Blocks, world_size: int) -> dict[int, int]:
    """Return which rank makes which unit's: the costly ones first, each to the rank that has least."""
    cost = {number: 1.0 + sum(map(bytes_for, _widths(blocks, number))) for number in blocks.units}
    load, makers = [0.0] * world_size, {}
    for number in sorted(cost, key=lambda number: (-cost[number], number)):
        makers[number] = min(range(world_size), key=lambda rank: (load[rank], rank))
        load[makers[number]] += cost[number]
    return dict(sorted(makers.items()))


def _wanted(blocks: Blocks, number: int) -> list[str]:
    one = blocks.candidates[number]
    return one.recipe.wants(one.changes)


def _widths(blocks: Blocks, number: int) -> list[int]:
    module = blocks.chain.block_module(blocks.candidates[number].input)
    return [module.get_submodule(path).weight[0].numel() for path in _wanted(blocks, number)]  # type: ignore[index]


def _make_all(
    context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks, own: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write the first weights of these units; yield their numbers, with their errors and how much of the variance
    sketches hold."""
    held_out = OnTheWay(blocks.chain, lambda: held_out_images(dataset))
    fitted = OnTheWay(blocks.chain, lambda: dataset.train_batch(context.config.student.statistics_batches).images)
    for numbers in with_room(([number], _widths(blocks, number)) for number in own):
        statistics = gathered(context, dataset, teacher, [path for n in numbers for path in _wanted(blocks, n)])
        for number in numbers:
            module = made(context, blocks, number, statistics, fitted)
            write_bytes(context.run.path / first_file(number), save(contiguous(module.state_dict())))
            sketches = {path: seen for path in _wanted(blocks, number) if (seen := _sketch(statistics, path))}
            shares = {path: seen.share for path, seen in sketches.items()}
            yield number, {"relative_error": error_of(blocks, number, module, held_out), "sketched": shares}


def _sketch(statistics: Statistics, path: str) -> Sketch | None:
    seen = statistics[path].covariance if path in statistics else None
    return seen if isinstance(seen, Sketch) else None


def with_room(groups: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[int]]:
    """Yield numbers, each with those of its group, in lists whose statistics have room together. A group has the widths
    of the layers that it asks about."""
    used, together = 0, list[int]()
    for numbers, widths in groups:
        needed = sum(map(bytes_for, widths))
        if used and used + needed > AT_A_TIME:
            yield together
            used, together = 0, []
        used, together = used + needed, [*together, *numbers]
    if together:
        yield together


def gathered(context: Context, dataset: Dataset, teacher: nn.Module, paths: Sequence[str]) -> Statistics:
    """Return what flows into these of the teacher's layers, over the first training batches."""
    if not paths:
        return {}
    batches = context.config.student.statistics_batches
    layers = {path: teacher.get_submodule(path) for path in paths}
    norms = {path: module for path, module in teacher.named_modules() if isinstance(module, _BatchNorm)}
    images = (dataset.train_batch(step).images for step in range(batches))
    with seen_heads(teacher):
        found = gather(layers, images, teacher.eval(), norms)
    return {path: one for path, one in found.items() if one.rows > 0}


def made(context: Context, blocks: Blocks, number: int, statistics: Statistics, fitted: OnTheWay) -> nn.Module:
    """Return a unit's module with its first weights, in eval mode; `fitted` are the images that regressions are for."""
    unit, recipe = blocks.units[number], blocks.candidates[number].recipe
    seed = derive_seed(context.config.seed, "student", unit.key)
    module = blocks.build(number, torch.Generator().manual_seed(seed), statistics)
    if not all(tensor.isfinite().all() for tensor in module.state_dict().values()):
        log.warning(
            "block %s: its first weights are not finite; they are those of the teacher's weights alone", unit.name
        )
        module = blocks.build(number, torch.Generator().manual_seed(seed))
    to_channels_last(module, context.device)
    if recipe.regressed:
        _regress(blocks, number, module, fitted)
    return module.eval()


def _regress(blocks: Blocks, number: int, module: nn.Module, images: OnTheWay) -> None:
    """Complete first weights of a block that has none of the teacher's layers: its batch norms by what they get, the
    layers that its output is a sum of by regression, in turn where there are several (backfitting; Buja, Hastie,
    Tibshirani 1989, "Linear smoothers and additive models")."""
    one = blocks.candidates[number]
    (inputs,) = images.at(one.input)
    parts = list(torch.split(inputs.float(), IMAGES))
    recalibrate(module, parts)
    teacher = blocks.teacher_module(number).eval()
    pairs = [(part, part) for part in parts]
    for _ in range(SWEEPS):
        if refit_block(module.eval(), teacher, pairs, one.recipe.paths(one.changes)) < 2:
            break


@torch.no_grad()
def error_of(blocks: Blocks, number: int, module: nn.Module, images: OnTheWay) -> float:
    """Return the relative error of a unit's module on the teacher's activations for these images."""
    unit = blocks.units[number]
    inputs, targets = images.at(unit.input, unit.target)
    return float(relative_error(module(narrowed(unit.reads, inputs).float()), narrowed(unit.gives, targets)))
