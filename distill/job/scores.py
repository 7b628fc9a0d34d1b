"""Every candidate with its first weights, scored without training: how far its block is from the teacher's, and how far
the teacher's answers move when it alone stands in its block's place. On validation images.

All ranks work side by side, each on a run of candidates in the order of blocks, so that a block's inputs and statistics
are had once, or twice where a block is shared. A candidate's weights and scores are a function of (seed, block, recipe,
teacher, images) alone, whoever computes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from distill.data import Dataset
from distill.job.context import Context
from distill.job.first_weights import IMAGES, OnTheWay, Statistics, gathered, made, with_room
from distill.job.pool import Pool
from distill.job.reuse import TEACHER, candidates_identity, take_candidates
from distill.job.sharing import answers_of_all
from distill.job.streams import chosen_units, with_space
from distill.job.swaps import Units
from distill.observability.numbers import show_count
from distill.storage.checkpoint import contiguous
from distill.storage.files import write_bytes
from distill.student.assemble import assemble
from distill.student.divergence import log_probabilities, mean_divergence
from distill.training.losses import relative_error

STAGE = "candidates"
WEIGHTS = 20  # blocks that run on the images of a score while a candidate gets its first weights (ResNet-20)


@dataclass(frozen=True)
class Score:
    """Of a swap: the relative error at its end, and the divergence of the network's answers from the teacher's (nats an
    image, Kullback-Leibler); None where they are not finite. And which units stay of its streams, by their number."""

    error: float | None
    divergence: float | None
    units: Units = field(default_factory=dict)

    @classmethod
    def from_json(cls, one: Mapping[str, Any]) -> Score:
        """Return what a stage has recorded."""
        units = {int(number): kept for number, kept in one.get("units", {}).items()}
        return cls(one["error"], one["divergence"], units)


@dataclass(frozen=True)
class Standing:
    """Where a swap stands before the choice: its score, and the file of its weights; its score `before` these were
    trained, for so many steps; and where training it further was given up, when and why."""

    score: Score
    file: str
    before: Score
    trained_steps: int = 0
    dropped: Mapping[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is recorded of it, as JSON values."""
        now, before = ({"error": one.error, "divergence": one.divergence} for one in (self.score, self.before))
        return {**now, "trained_steps": self.trained_steps, "before": before, "dropped": self.dropped}


def weights_file(number: int, stage: str | None = None) -> str:
    """Return the name of the file of a swap's weights within the run directory: its first ones, or those that it has
    after a stage of training."""
    return f"candidates/{number:03d}{f'_{stage}' if stage else ''}.safetensors"


def weights_in(context: Context, file: str) -> dict[str, Tensor]:
    """Return a swap's weights, those of all its members together, on the CPU."""
    return load(context.run.read(file))


def find_scores(context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool) -> list[Standing]:
    """Return where all swaps stand with their first weights, the same on every rank. Every rank must call."""
    with context.during(STAGE):
        if context.leads and context.run.result(STAGE) is None:
            _take(context, teacher, pool)
        result = context.completed(STAGE)
        if result is None:
            result = _compute(context, dataset, teacher, pool)
    scores = [Score.from_json(one) for one in result["scores"]]
    return [Standing(score, weights_file(number), score) for number, score in enumerate(scores)]


def _take(context: Context, teacher: nn.Module, pool: Pool) -> None:
    """Complete the stage with what a sibling has of it, if one has scored the same candidates."""
    facts = [swap.facts for swap in pool.swaps]
    images = context.config.search.images
    identity = candidates_identity(context.identity, pool.chain, facts, teacher=teacher, images=images)
    files = [weights_file(number) for number in range(len(facts))]
    result = take_candidates(context, identity, files)
    if result is not None:
        context.run.complete(STAGE, result, made=files, used=[TEACHER])


def _compute(context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool) -> dict[str, Any]:
    start, purpose = time.monotonic(), "scores of candidates"
    work = partial(_score_all, context, dataset, teacher, pool)
    found = answers_of_all(context, STAGE, shared_out(pool, context.world_size), work, purpose=purpose, did="scored")
    if found is None:
        result: dict[str, Any] = context.control.wait(f"result/{STAGE}", peer=0, purpose=purpose)
        return result
    scores, cpu_s = found
    seconds, images = time.monotonic() - start, len(_images(context, dataset))
    result = {"scores": scores, "images": images, "seconds": seconds, "cpu_seconds": cpu_s}
    context.run.complete(STAGE, result, made=[weights_file(number) for number in range(len(scores))], used=[TEACHER])
    context.say(
        f"candidates: {len(scores)} of {show_count(len(pool.blocks), 'block')} scored on "
        f"{show_count(images, 'validation image')} in {seconds:.1f} s ({cpu_s:.1f} CPU s)"
    )
    context.control.set(f"result/{STAGE}", result)
    return result


def shared_out(pool: Pool, world_size: int) -> list[range]:
    """Return for every rank the run of swaps that it scores, of about the same cost."""
    last = len(pool.chain.blocks)
    # What is behind a block runs for each of its candidates; most of the time goes into its first weights, though.
    costs = [float(WEIGHTS + last - swap.first) for swap in pool.swaps]
    total, done, ends = sum(costs), 0.0, [0]
    for number, cost in enumerate(costs):
        done += cost
        while len(ends) < world_size and done >= total * len(ends) / world_size:
            ends.append(number + 1)
    return [range(start, end) for start, end in zip(ends, [*ends[1:], len(costs)], strict=True)]


def _score_all(
    context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool, own: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write the first weights of these swaps; yield their numbers and scores."""
    judge = Judge(context, dataset, teacher, pool)
    fitted = OnTheWay(pool.chain, lambda: dataset.train_batch(context.config.student.statistics_batches).images)
    for numbers in with_room(_by_place(pool, own)):
        statistics = _Statistics(
            context, dataset, teacher, [path for number in numbers for path in _wanted(pool, number)]
        )
        for number in numbers:
            choosing = with_space(teacher, list(_wanted(pool, number)))
            units = chosen_units(teacher, pool.swaps[number].members, statistics.of(choosing))
            alone = pool.with_units({number: units} if units else {}).alone(number)
            modules = {
                block: made(context, alone, block, statistics.of(one.recipe.wants(one.changes)), fitted)
                if one.trains
                else alone.build(block).eval()
                for block, one in alone.candidates.items()
            }
            state = {name: tensor for module in modules.values() for name, tensor in module.state_dict().items()}
            write_bytes(context.run.path / weights_file(number), save(contiguous(state)))
            yield number, judge.score(number, modules) | ({"units": units} if units else {})


class _Statistics:
    """What flows into layers of the teacher: into these, as far as they have room, gathered together."""

    def __init__(self, context: Context, dataset: Dataset, teacher: nn.Module, paths: Iterable[str]) -> None:
        self._gathered = partial(gathered, context, dataset, teacher)
        self._paths = with_space(teacher, list(dict.fromkeys(paths)))
        self._together = self._gathered(self._paths)

    def of(self, paths: Sequence[str]) -> Statistics:
        """Return those of these layers."""
        found = self._together if set(paths) <= set(self._paths) else self._gathered(paths)
        return {path: found[path] for path in paths if path in found}


def _by_place(pool: Pool, own: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the swaps of every place, and the widths of the layers that they ask about."""
    for _, numbers in groupby(own, key=lambda number: pool.swaps[number].covers):
        found = list(numbers)
        paths = {path: block for number in found for path, block in _wanted(pool, number).items()}
        modules = {block: pool.chain.block_module(block) for block in set(paths.values())}
        widths = [modules[block].get_submodule(path).weight[0].numel() for path, block in paths.items()]  # type: ignore[index]
        yield found, widths


def _wanted(pool: Pool, number: int) -> dict[str, int]:
    """Return the layers whose inputs' statistics a swap asks about, each with its block."""
    return {path: one.input for one in pool.swaps[number].members for path in one.recipe.wants(one.changes)}


def _images(context: Context, dataset: Dataset) -> Tensor:
    """Return the validation images on which candidates are scored."""
    wanted = context.config.search.images
    batches = islice(dataset.validation_batches(IMAGES), -(-wanted // IMAGES))
    return torch.cat([batch.images for batch in batches])[:wanted]


class Judge:
    """Scores swaps, in the order of their blocks."""

    def __init__(self, context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool) -> None:
        self._teacher, self._pool, self._chain = teacher, pool, pool.chain
        self._images = _images(context, dataset)
        self._way = OnTheWay(pool.chain, lambda: self._images)
        self._last = len(pool.chain.blocks)
        self._answers = log_probabilities(self._run(self._images, 0))
        self._place, self._ends = range(0), [self._images]

    def _run(self, x: Tensor, first: int) -> Tensor:
        """Return the teacher's answers for what passes boundary `first`, a part of the images at a time."""
        parts = torch.split(x, IMAGES)
        return torch.cat(
            [self._chain.run(part, first=first, last=self._last, keep=[self._last])[self._last] for part in parts]
        )

    @torch.no_grad()
    def score(self, number: int, modules: Mapping[int, nn.Module]) -> dict[str, Any]:
        """Return the Score of a swap by its modules, by block, as JSON values."""
        place = self._pool.swaps[number].covers
        if place != self._place:
            self._place, self._ends = place, self._way.at(place.start, place.stop)
        inputs, targets = self._ends
        row = self._pool.row(number, modules).eval()
        outputs = torch.cat([row(part.float()) for part in torch.split(inputs, IMAGES)])
        error = float(relative_error(outputs, targets))
        if self._chain.divisible:
            logits = self._run(outputs, place.stop)
        else:
            changed = self._pool.alone(number).changed
            states = [module.state_dict() for module in modules.values()]
            student = assemble(self._teacher, changed=changed, blocks=states).eval()
            logits = torch.cat([student(part) for part in torch.split(self._images, IMAGES)])
        divergence = mean_divergence(self._answers, logits)
        return {"error": _finite(error), "divergence": _finite(divergence)}


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
