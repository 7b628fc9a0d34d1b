"""Candidates trained before the choice, in rounds of successive halving: before each the half stays with which the best
student within the budgets loses least (distill/search/halving.py).

What stays to the end is trained just as the distill stage trains a block for `search.steps` steps: by the same trainer,
batch t at step t, one course of rates over all rounds. So its weights are a function of its first weights, the teacher
and the data alone, every round is shared out anew over the ranks, and a teacher's pass serves all candidates that a
rank has room for. Rank 0 alone decides who stays. Between rounds, optimizers are in checkpoints/.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from safetensors.torch import save
from torch import nn

from distill.blocks.chain import made_trainable
from distill.blocks.memory_format import to_channels_last
from distill.data import Dataset
from distill.job.context import Context
from distill.job.pool import KEEP, Pool, parted
from distill.job.problem import Problem
from distill.job.reuse import TEACHER
from distill.job.scores import Judge, Standing, weights_file, weights_in
from distill.job.sharing import answers_of_all
from distill.job.trainers import trainer_options
from distill.observability.numbers import show_count
from distill.planning.unit import boundaries_of
from distill.search.halving import ROUNDS, ends, halved, regrets
from distill.storage.checkpoint import CheckpointFolder
from distill.storage.files import write_bytes
from distill.training.trainer import BlockTrainer

STAGES = tuple(f"halving_{number}" for number in range(1, ROUNDS + 1))
TENSORS = 4  # of every weight while it trains: itself, its gradient, two of adam's
AT_A_TIME = 2**30  # bytes of them

Found = Mapping[str, Any]


def with_training(
    context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool, standings: Sequence[Standing]
) -> list[Standing]:
    """Return where all swaps stand after `search.steps` steps, the same on every rank; at once where these are none.
    Every rank must call; rank 0 with all budgeted amounts in its pool."""
    config, found = context.config, list(standings)
    if config.search.steps == 0:
        return found
    dataset = dataset.with_views(config.distill.views)
    origin = context.run.origin(TEACHER, *(one.file for one in standings))
    checkpoints = CheckpointFolder(context.run.path, generation=context.control.generation, origin=origin)
    remaining = [number for number, swap in enumerate(pool.swaps) if swap.trains]
    for stage, stop in zip(STAGES, ends(config.search.steps), strict=True):
        with context.during(stage):
            result = context.completed(stage)
            if result is None:
                training = _Round(context, dataset, teacher, pool, found, checkpoints, stage, stop)
                result = training.result(remaining)
        remaining = [int(number) for number in result["trained"]]
        found = [_moved_on(one, result, str(number), stage) for number, one in enumerate(found)]
    return found


def _moved_on(one: Standing, result: Found, number: str, stage: str) -> Standing:
    """Return where a swap stands after a round with that result: with its trained weights, or its first ones where
    these are better."""
    if number in result["dropped"]:
        return replace(one, dropped={"stage": stage, **result["dropped"][number]})
    if number not in result["trained"]:
        return one
    now, first = result["trained"][number], weights_file(int(number))
    if not now["better"]:
        return replace(one, score=one.before, file=first, trained_steps=0)
    score = replace(one.before, error=now["error"], divergence=now["divergence"])
    file = weights_file(int(number), stage)
    return replace(one, score=score, file=file, trained_steps=result["steps"])


@dataclass(frozen=True)
class _Round:
    """One round, up to the step `stop`: who stays, trained and scored."""

    context: Context
    dataset: Dataset
    teacher: nn.Module
    pool: Pool
    standings: Sequence[Standing]
    checkpoints: CheckpointFolder
    stage: str
    stop: int

    def result(self, remaining: Sequence[int]) -> Found:
        """Return what comes of the swaps that remained before; it is recorded. Every rank must call."""
        context, stage, start = self.context, self.stage, time.monotonic()
        if context.leads:
            problem = Problem.of(context.config, self.pool, [one.score for one in self.standings])
            context.control.set(f"{stage}/decided", decided(problem, remaining))
        who = context.control.wait(f"{stage}/decided", peer=0, purpose="candidates to be trained")
        shares, purpose = shared_evenly(who["stay"], context.world_size), "training of candidates"
        told = answers_of_all(context, stage, shares, self._train, purpose=purpose, did="trained")
        if told is None:
            found: Found = context.control.wait(f"result/{stage}", peer=0, purpose=purpose)
            return found
        trained = {str(number): answer for number, answer in zip(who["stay"], told[0], strict=True)}
        dropped, seconds, cpu_s = len(remaining) - len(trained), time.monotonic() - start, told[1]
        result = {"steps": self.stop, "trained": trained, "dropped": who["dropped"]}
        result |= {"seconds": seconds, "cpu_seconds": cpu_s}
        better = [number for number in who["stay"] if trained[str(number)]["better"]]
        used = [TEACHER, *(weights_file(number) for number in who["stay"])]
        context.run.complete(stage, result, made=[weights_file(number, stage) for number in better], used=used)
        for number in remaining:
            if stage == STAGES[-1] or number not in who["stay"]:
                for block in self.pool.alone(number).units:
                    self.checkpoints.remove(_name(number, block))
        context.say(
            f"{stage}: {show_count(dropped, 'candidate')} dropped, {len(trained)} trained to step "
            f"{self.stop} in {seconds:.1f} s ({cpu_s:.1f} CPU s), of which {len(better)} are better than they began"
        )
        context.control.set(f"result/{stage}", result)
        return result

    def _train(self, own: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Train these swaps, and write the weights of those that are better by it; yield their numbers and scores."""
        if not own:
            return
        judge = Judge(self.context, self.dataset, self.teacher, self.pool)
        for numbers in self._with_room(own):
            trainers = self._trained(numbers)
            for number in numbers:
                alone, state = self.pool.alone(number), weights_in(self.context, weights_file(number))
                members = {block: trainer for (swap, block), trainer in trainers.items() if swap == number}
                modules = alone.students(parted(alone, state)) | {block: one.module for block, one in members.items()}
                score = judge.score(number, modules)
                first, now = self.standings[number].before.divergence, score["divergence"]
                diverged = any(trainer.diverged_at is not None for trainer in members.values())
                better = now is not None and not diverged and (first is None or now < first)
                if better:
                    for trainer in members.values():
                        state |= trainer.final().weights
                    write_bytes(self.context.run.path / weights_file(number, self.stage), save(state))
                for trainer in members.values():
                    trainer.free()
                yield number, {**score, "better": better}

    def _with_room(self, own: Sequence[int]) -> Iterator[list[int]]:
        """Yield the swaps in lists that have room together while they train."""
        used, together = 0, list[int]()
        for number in own:
            needed = TENSORS * (self.context.run.path / weights_file(number)).stat().st_size
            if together and used + needed > AT_A_TIME:
                yield together
                used, together = 0, []
            used, together = used + needed, [*together, number]
        yield together

    def _trained(self, numbers: Sequence[int]) -> dict[tuple[int, int], BlockTrainer]:
        """Return the trainers of these swaps' members, by swap and block, at the end of the round: from their
        checkpoints on, or from the start."""
        trainers = {key: trainer for number in numbers for key, trainer in self._trainers(number)}
        keep = boundaries_of(trainer.unit for trainer in trainers.values())
        first = min(trainer.step for trainer in trainers.values())
        with closing(self.dataset.train_batches(first, self.stop)) as batches:
            for step, batch in enumerate(batches, first):
                found = self.pool.chain.run(batch.images, last=max(keep), keep=keep)
                for trainer in trainers.values():
                    if trainer.step == step and not trainer.finished:
                        trainer.update(found[trainer.unit.input], found[trainer.unit.target])
        for key, trainer in trainers.items():
            state = trainer.checkpoint()
            if state is not None:
                self.checkpoints.save(replace(state, name=_name(*key)))
        return trainers

    def _trainers(self, number: int) -> Iterator[tuple[tuple[int, int], BlockTrainer]]:
        """Yield the trainers of a swap's members alone, where the round before has left them."""
        context, alone = self.context, self.pool.alone(number)
        parts, options = parted(alone, weights_in(context, weights_file(number))), trainer_options(context.config)
        for block, unit in alone.units.items():
            module = made_trainable(alone.student(block, parts[block]))
            to_channels_last(module, context.device)
            budget = context.config.search.steps
            trainer = BlockTrainer(unit, module, budget=budget, device=context.device, options=options)
            checkpoint = self.checkpoints.load(_name(number, block))
            if checkpoint is not None and checkpoint.step <= self.stop:
                trainer.resume(checkpoint)
            yield (number, block), trainer


def _name(number: int, block: int) -> str:
    """Return the checkpoint name of a swap's member."""
    return f"candidate{number:03d}_{block}"


def decided(problem: Problem, remaining: Sequence[int]) -> dict[str, Any]:
    """Return the numbers of the swaps that stay of those remaining, and why others do not, as JSON values."""
    numbers = {place: int(one.name) for place, one in enumerate(problem.options) if one.name != KEEP}
    places = [place for place, number in numbers.items() if number in set(remaining)]
    regret = regrets(problem.options, places, problem.limits)
    stay = [numbers[place] for place in halved(problem.options, regret)]
    more = {numbers[place]: loses for place, loses in regret.items()}
    return {"stay": stay, "dropped": {str(one): _why(more.get(one)) for one in remaining if one not in stay}}


def _why(loses_more: float | None) -> dict[str, Any]:
    """Return why a candidate is dropped, by how much more students with it lose; None: its answers are not finite."""
    if loses_more is None:
        return {"why": "its answers are not finite", "loses_more": None}
    if math.isinf(loses_more):
        return {"why": "no student with it keeps to the budgets", "loses_more": None}
    return {"why": "students with others for its block lose less", "loses_more": loses_more}


def shared_evenly(numbers: Sequence[int], world_size: int) -> list[Sequence[int]]:
    """Return for every rank the run of swaps that it trains: neighbours read the same boundaries."""
    ends = [round(len(numbers) * rank / world_size) for rank in range(world_size + 1)]
    return [numbers[start:end] for start, end in pairwise(ends)]
