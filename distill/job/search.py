"""The search stage: of all candidates, as they are scored, the student that is best within the budgets.

What the student loses is taken to be the sum of what its blocks lose one by one; the best few choices by that are put
together, put right as far as closed forms can, and judged as whole students on validation images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.schema import JobConfig
from distill.data import Batch, Dataset
from distill.deployment.chains import LatencyTable
from distill.errors import DistillError
from distill.job.blocks import Blocks, at_work, cut_chain, refuse_strangers, sample_images
from distill.job.candidates import Candidate
from distill.job.context import Context
from distill.job.first_weights import take_first_weights
from distill.job.halving import with_training
from distill.job.latency import runtime_of_job, table_of_job, timings_of_job
from distill.job.pool import Pool, parted, refuse_unreachable
from distill.job.problem import Judged, Problem, found_record, words
from distill.job.recipes import rebuilt
from distill.job.reconcile import JUDGED, reconciled
from distill.job.reuse import TEACHER
from distill.job.scores import Standing, find_scores, weights_in
from distill.job.sharing import TOLD_EVERY_S
from distill.job.whole_latency import corrected
from distill.search.budgets import shown
from distill.student.assemble import assemble
from distill.student.divergence import log_probabilities, mean_divergence
from distill.student.evaluate import images_at_a_time

STAGE = "search"
BATCHES = 16  # over which batch norms are re-estimated of students that are only judged


def found_students(
    config: JobConfig, image_shape: tuple[int, ...], teacher: nn.Module, device: torch.device, result: Mapping[str, Any]
) -> Blocks:
    """Return the student that a complete search has chosen, without trying any candidate again."""
    chain = cut_chain(config, image_shape, teacher, device)
    candidates = {}
    for block, one in result["candidates"].items():
        name, changes, place = one["recipe"], one["changes"], int(block)
        recipe = rebuilt(name, one["options"])
        candidates[place] = Candidate(name, recipe, changes, place, place + 1, one["trains"], one["label"])
    return Blocks(at_work(config, chain, device), candidates)


def choose_students(context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool) -> Blocks:
    """Return the student to be trained, the same on every rank. Every rank must call."""
    standings = find_scores(context, dataset, teacher, pool)
    pool = pool.with_units({number: one.score.units for number, one in enumerate(standings) if one.score.units})
    if context.leads:  # clocks and solvers are asked once: all ranks take its word for what there is to train, or judge
        with context.during(STAGE):
            pool = timed(context, teacher, pool, standings)
    standings = with_training(context, dataset, teacher, pool, standings)
    with context.during(STAGE):
        start = time.monotonic()
        if context.leads:
            problem = Problem.of(context.config, pool, [standing.score for standing in standings])
            few = problem.best_few(context.config.search.judged)
            if not few:  # where all that is left after those whose answers are not finite is too large
                raise DistillError("search: no choice of the candidates that could be scored keeps to the budgets")
            context.control.set("choices", [problem.swaps(choice) for choice in few])
        found = context.control.wait("choices", peer=0, purpose="choices of candidates")
        students = [{number: standings[number].file for number in numbers} for numbers in found]
        judged = _judged(context, dataset, teacher, pool, students)
        best = min(range(len(students)), key=lambda number: (judged[number].rank, number))
        if judged[best].divergence is None:
            raise DistillError(
                "search: the answers of all students that were put together hold nan or infinity on validation images; "
                "raise the budget, or name other search.candidates"
            )
        blocks = pool.with_swaps(students[best])
        refuse_strangers(teacher, pool.chain, sample_images(dataset.image_shape, context.device), blocks.candidates)
        if context.leads:
            take_first_weights(context, dataset, blocks, _weights(context, pool, students[best]))
            judgements = list(zip(few, judged, strict=True))
            result = found_record(context.config, problem, standings=standings, judgements=judgements, best=best)
            result |= {"seconds": time.monotonic() - start}
            context.run.complete(STAGE, result, used=[TEACHER, *students[best].values()])
            for line in words(result):
                context.say(line)
    return blocks


def timed(context: Context, teacher: nn.Module, pool: Pool, standings: Sequence[Standing]) -> Pool:
    """Return the pool with latencies, where these have a budget. Raises ConfigError where none is as fast as that."""
    config = context.config
    if config.search.budget.latency is None:
        return pool
    start = told = time.monotonic()
    table = LatencyTable(
        pool.chain, teacher, runtime_of_job(config), batch=config.deploy.batch, timings=timings_of_job(config)
    )
    more: list[float] = []
    for place, numbers in groupby(range(len(pool.swaps)), key=lambda number: pool.swaps[number].covers):
        modules = {str(n): pool.module(n, weights_in(context, standings[n].file)) for n in numbers}
        found = table.differences((place.start, place.stop), modules)
        more += [found[name].median_ms for name in modules]
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            context.say(f"latency: {len(more)} of {len(pool.swaps)} candidates timed, {told - start:.0f} s so far")
    pool = pool.with_amounts("latency", table.teacher.median_ms, more)
    context.say(
        f"latency: {len(more)} candidates timed in {table.runtime.name}, batch {table.batch}, in "
        f"{time.monotonic() - start:.1f} s; the teacher takes {shown('latency', pool.teacher['latency'])}"
    )
    if table_of_job(config) is None:  # another device times no whole students
        whole = partial(_whole_ms, context, teacher, pool, table, standings=standings)
        pool = corrected(config, pool, [one.score for one in standings], whole, context.say)
    refuse_unreachable(config, pool)
    return pool


def _whole_ms(
    context: Context,
    teacher: nn.Module,
    pool: Pool,
    table: LatencyTable,
    numbers: Sequence[int],
    *,
    standings: Sequence[Standing],
) -> float:
    """Return the milliseconds of the student of these swaps."""
    files = {number: standings[number].file for number in numbers}
    weights = _weights(context, pool, files)
    return table.measured(assemble(teacher, changed=pool.with_swaps(files).changed, blocks=weights.values()).eval())


def _judged(
    context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool, students: Sequence[Mapping[int, str]]
) -> list[Judged]:
    """Return how students of these swaps, with the weights in their files, answer on validation images; the ranks take
    turns."""
    own = [number for number in range(len(students)) if number % context.world_size == context.rank]
    size = images_at_a_time(dataset.image_shape)
    batches = list(islice(dataset.validation_batches(size), JUDGED // size)) if own else []
    with torch.no_grad():
        answers = [log_probabilities(teacher(batch.images)) for batch in batches]
    for number in own:
        student = _put_together(context, dataset, teacher, pool, students[number])
        context.control.set(f"{STAGE}/{number}", asdict(_judge(student, batches, answers)))
    found = []
    for number in range(len(students)):
        peer = number % context.world_size
        found.append(Judged(**context.control.wait(f"{STAGE}/{number}", peer=peer, purpose="judgement of students")))
    return found


def _put_together(
    context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool, swaps: Mapping[int, str]
) -> nn.Module:
    """Return the student of these swaps with the weights in their files, put right as far as closed forms can."""
    blocks = pool.with_swaps(swaps)
    return reconciled(context, dataset, teacher, blocks, _weights(context, pool, swaps), batches=BATCHES)


def _weights(context: Context, pool: Pool, swaps: Mapping[int, str]) -> dict[int, dict[str, Tensor]]:
    """Return the weights of the student of these swaps, which are in their files, by unit."""
    parts = (parted(pool.alone(number), weights_in(context, file)) for number, file in swaps.items())
    weights = {block: state for part in parts for block, state in part.items()}
    return {unit: weights[unit] for unit in pool.with_swaps(swaps).units}


@torch.no_grad()
def _judge(student: nn.Module, batches: Sequence[Batch], answers: Sequence[Tensor]) -> Judged:
    total, right = 0.0, 0
    for batch, answer in zip(batches, answers, strict=True):
        logits = student(batch.images)
        total += len(batch.labels) * mean_divergence(answer, logits)
        right += int((logits.argmax(dim=1) == batch.labels).sum())
    images = sum(len(batch.labels) for batch in batches)
    return Judged(total / images if math.isfinite(total) else None, 100 * right / images, images)
