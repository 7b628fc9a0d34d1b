"""Latencies of candidates put right by what whole students take.

A candidate is timed in a chain of three blocks, whose weights lie in the caches nearest to the core; those of a whole
network may not, and smaller blocks then save more than their chains show (MobileNetV2 at batch 1: twice as much). In
other runtimes they save less. So the student that would be chosen is timed as a whole, all differences are scaled to
what it says, and the choice is made again, until both agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distill.config.schema import JobConfig
from distill.job.pool import Pool
from distill.job.problem import Problem
from distill.job.scores import Score
from distill.search.choice import least

TRIES = 5  # students that are timed at most
CLOSE = 0.03  # of the budget: so near a prediction is right


def corrected(
    config: JobConfig,
    pool: Pool,
    scores: Sequence[Score],
    whole: Callable[[Sequence[int]], float],
    say: Callable[[str], object],
) -> Pool:
    """Return the pool with latencies that add up for the best choice, or for the fastest where none keeps to the
    budgets: `whole` gives the milliseconds of the student of some swaps, by their numbers."""
    teacher = pool.teacher["latency"]
    budget = teacher + pool.limits(config)["latency"]
    for _ in range(TRIES):
        problem = Problem.of(config, pool, scores)
        best, *_ = problem.best_few(1) or [least(problem.options, "latency")]
        predicted, measured = best.amounts["latency"], whole(problem.swaps(best)) - teacher
        if abs(measured - predicted) <= CLOSE * budget or not (predicted < 0 and measured < 0):
            break
        factor = measured / predicted
        say(
            f"latency: the student takes {teacher + measured:.3g} ms as a whole, {teacher + predicted:.3g} were "
            f"predicted: what candidates save counts {factor:.2f} times, and is chosen from again"
        )
        pool = pool.with_amounts("latency", teacher, [factor * swap.amounts["latency"] for swap in pool.swaps])
    return pool
