"""What is chosen from a pool: the problem that the solver gets, and what its answers say in figures and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from distill.config.schema import JobConfig
from distill.job.pool import KEEP, Pool
from distill.job.scores import Score, Standing
from distill.job.swaps import BETWEEN
from distill.observability.numbers import show_count
from distill.search.budgets import shown
from distill.search.choice import Choice, Option, choices, choose

DIFFERENT = 0.2  # of the blocks that may change: in so many of them at least students that are judged differ
MORE = 0.1  # of a budget: what so much more of it would buy is told


@dataclass(frozen=True)
class Judged:
    """A student that was put together: how far its answers are from the teacher's (nats an image; None where they are
    not finite), and how many of so many validation images it has right, in percent."""

    divergence: float | None
    top1: float
    images: int

    @property
    def rank(self) -> float:
        return math.inf if self.divergence is None else self.divergence


@dataclass(frozen=True)
class Problem:
    """The options of all blocks, and by how much more than the teacher's every budgeted amount may be."""

    pool: Pool
    options: tuple[Option, ...]
    limits: Mapping[str, float]

    @classmethod
    def of(cls, config: JobConfig, pool: Pool, scores: Sequence[Score]) -> Problem:
        losses = {number: one.divergence for number, one in enumerate(scores) if one.divergence is not None}
        return cls(pool, tuple(pool.options(losses)), pool.limits(config))

    def best_few(self, count: int) -> list[Choice]:
        """Return the best choice and others that are nearly as good, and differ from one another."""
        apart = max(1, round(DIFFERENT * len(self.pool.blocks)))
        return list(islice(choices(self.options, self.limits, apart=apart), count))

    def swaps(self, choice: Choice) -> list[int]:
        """Return the numbers of the pool's swaps that a choice consists of; none for blocks that stay."""
        return [int(self.options[number].name) for number in choice.options if self.options[number].name != KEEP]

    def labels(self, choice: Choice) -> dict[str, str]:
        """Return what every block becomes, by name."""
        chosen = {
            block: swap.label for swap in map(self.pool.swaps.__getitem__, self.swaps(choice)) for block in swap.covers
        }
        return {self.pool.chain.blocks[block].name: chosen.get(block, KEEP) for block in self.pool.blocks}

    def predicted(self, choice: Choice) -> dict[str, float]:
        """Return the amounts of the whole student, and the sum of what its blocks lose alone."""
        whole = {name: self.pool.teacher[name] + more for name, more in choice.amounts.items()}
        return {**whole, "divergence": choice.loss}

    def with_more(self, name: str) -> tuple[float, Choice] | None:
        """Return what a little more of a budget is, and the best choice with it; None where it gains nothing."""
        budget = self.pool.teacher[name] + self.limits[name]
        best = choose(self.options, self.limits)
        wider = choose(self.options, {**self.limits, name: self.limits[name] + MORE * budget})
        if best is None or wider is None or not wider.loss < best.loss:
            return None
        return budget * (1 + MORE), wider


def found_record(
    config: JobConfig,
    problem: Problem,
    *,
    standings: Sequence[Standing],
    judgements: Sequence[tuple[Choice, Judged]],
    best: int,
) -> dict[str, Any]:
    """Return what the stage records of the choice, as JSON values: enough to build the student, and to explain it."""
    pool, choice = problem.pool, judgements[best][0]
    chosen = problem.swaps(choice)
    names = [block.name for block in pool.chain.blocks]
    return {
        "budget": {
            name: {"asked": getattr(config.search.budget, name), "limit": pool.teacher[name] + limit}
            for name, limit in problem.limits.items()
        },
        "teacher": dict(pool.teacher),
        "chosen": problem.labels(choice),
        "predicted": problem.predicted(choice),
        "losses": {pool.place_name(number): standings[number].score.divergence for number in chosen},
        "judged": [
            {"chosen": problem.labels(one), "predicted": problem.predicted(one), "proven": one.proven, **asdict(judged)}
            for one, judged in judgements
        ],
        "delivered": best,
        "more": {
            name: {"budget": found[0], "chosen": problem.labels(found[1]), "divergence": found[1].loss}
            for name in problem.limits
            if (found := problem.with_more(name)) is not None
        },
        "pool": [
            {
                "block": pool.place_name(number),
                "blocks": [names[block] for block in swap.covers],
                "candidate": swap.label,
                **pool.more(number),
                **standings[number].facts,
            }
            for number, swap in enumerate(pool.swaps)
        ],
        "candidates": {
            str(one.input): {**one.facts, "trains": one.trains, "label": one.label}
            for number in chosen
            for one in pool.swaps[number].members
        },
    }


def words(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is said of a choice: what it is, which block loses most, and what a little more would buy."""
    predicted, one = result["predicted"], result["judged"][result["delivered"]]
    steps = max(one["trained_steps"] for one in result["pool"])
    sizes = ", ".join(f"{name} {shown(name, predicted[name])}" for name in result["budget"])
    yield (
        f"search: {sizes}; of {len(result['judged'])} choices the one with divergence {one['divergence']:.3g} and "
        f"{one['top1']:.2f} % on {one['images']} validation images, "
        + (f"its candidates trained for up to {show_count(steps, 'step')}" if steps else "before any training")
    )
    for label in dict.fromkeys(result["chosen"].values()):
        yield f"search: {label}: {', '.join(block for block, own in result['chosen'].items() if own == label)}"
    if result["losses"]:
        worst = max(result["losses"], key=lambda block: result["losses"][block])
        share = result["losses"][worst] / max(sum(result["losses"].values()), 1e-30)
        label = result["chosen"][worst.partition(BETWEEN)[0]]
        yield f"search: {worst} ({label}) loses most, {100 * share:.0f} % of what blocks lose one by one"
    for name, found in result["more"].items():
        labels = {block: label for block, label in found["chosen"].items() if label != result["chosen"][block]}
        changed = [f"{block} ({label})" for block, label in labels.items()]
        less = 100 * (1 - found["divergence"] / max(predicted["divergence"], 1e-30))
        yield (
            f"search: with search.budget.{name}={shown(name, found['budget']).replace(' ', '')} blocks would lose "
            f"{less:.0f} % less, by {', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}"
        )
