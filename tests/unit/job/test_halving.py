"""Which candidates are trained on, and with which weights they stand before the choice."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from distill.config.compose import compose
from distill.errors import ConfigError
from distill.job.halving import _moved_on, decided, shared_evenly
from distill.job.pool import Pool, find_pool
from distill.job.problem import Problem
from distill.job.reuse import unit_identities
from distill.job.scores import Score, Standing
from distill.teachers import build_architecture

SETTINGS = (
    "data=digits", "data.image_size=16", "data.batch_size=4", "blocks.include=[layer3.*]", "search.budget.params=0.5",
    "search.candidates=[{recipe: skip},{recipe: separable,rank: 1},{recipe: separable,rank: 2},{recipe: one_conv}]",
)  # fmt: skip
FIRST = Score(0.5, 0.4)


@cache
def found() -> tuple[nn.Module, Pool]:
    teacher = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10).eval()
    return teacher, find_pool(compose(SETTINGS), (3, 16, 16), teacher, torch.device("cpu"))


def problem(losses: dict[str, float | None]) -> tuple[Problem, list[int]]:
    """The problem where candidates of one kind lose the same in all blocks, and the numbers of those that train."""
    pool = found()[1]
    scores = [Score(0.1, losses[swap.label]) for swap in pool.swaps]
    trains = [number for number, swap in enumerate(pool.swaps) if swap.trains]
    return Problem.of(compose(SETTINGS), pool, scores), trains


def labels(pool: Pool, numbers: list[int], block: str) -> list[str]:
    swaps = [pool.swaps[number] for number in numbers]
    return [swap.label for swap in swaps if pool.chain.blocks[swap.first].name == block]


def test_half_of_what_trains_stays_and_why_others_do_not_is_said() -> None:
    one, remaining = problem({"skip": 9.0, "separable rank=1": 0.3, "separable rank=2": 0.2, "one_conv": None})
    who = decided(one, remaining)
    assert labels(one.pool, who["stay"], "layer3.0") == [
        "separable rank=1",
        "separable rank=2",
    ]  # of three: skip trains
    for block in ("layer3.1", "layer3.2"):
        assert labels(one.pool, who["stay"], block) == ["separable rank=2"]
    assert {number for number in remaining if number not in who["stay"]} == {int(number) for number in who["dropped"]}
    whys = {one.pool.swaps[int(number)].label: dropped for number, dropped in who["dropped"].items()}
    assert whys["one_conv"] == {"why": "its answers are not finite", "loses_more": None}
    assert whys["separable rank=1"]["loses_more"] == pytest.approx(0.1)
    assert len(decided(one, who["stay"])["stay"]) == 3, "one a block"


def test_a_swap_has_its_trained_weights_as_long_as_these_are_better_than_its_first() -> None:
    before = Standing(FIRST, "candidates/007.safetensors", FIRST)

    def after(one: Standing, steps: int, divergence: float | None, *, better: bool) -> Standing:
        trained = {"7": {"error": 0.2, "divergence": divergence, "better": better}}
        return _moved_on(one, {"steps": steps, "trained": trained, "dropped": {}}, "7", "halving_1")

    better = after(before, 8, 0.3, better=True)
    assert (better.score, better.trained_steps) == (Score(0.2, 0.3), 8)
    assert better.file == "candidates/007_halving_1.safetensors"
    assert after(better, 16, 0.41, better=False) == before
    result: dict[str, Any] = {"steps": 16, "trained": {}, "dropped": {"7": {"why": "it is", "loses_more": 0.2}}}
    dropped = _moved_on(better, result, "7", "halving_2")
    assert dropped.facts == {
        "error": 0.2, "divergence": 0.3, "trained_steps": 8, "before": {"error": 0.5, "divergence": 0.4},
        "dropped": {"stage": "halving_2", "why": "it is", "loses_more": 0.2},
    }  # fmt: skip
    assert _moved_on(dropped, result | {"dropped": {}}, "7", "halving_3") == dropped


def test_ranks_train_runs_of_neighbours() -> None:
    assert shared_evenly([3, 4, 5, 8, 9], 2) == [[3, 4], [5, 8, 9]]
    assert shared_evenly([3], 3) == [[], [3], []]
    assert shared_evenly([], 2) == [[], []]


def test_blocks_whose_first_weights_were_trained_are_others() -> None:
    teacher, pool = found()
    blocks = pool.example
    plain, one, two = (
        unit_identities({}, blocks=blocks, teacher=teacher, budget=1, trained=trained)
        for trained in ({}, dict.fromkeys(blocks.units, "a"), dict.fromkeys(blocks.units, "b"))
    )
    assert all(len({plain[unit], one[unit], two[unit]}) == 3 for unit in blocks.units)


@pytest.mark.parametrize("steps", ["-4", "3"])
def test_rounds_need_steps(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"search\.steps: got -?\d; expected"):
        compose([*SETTINGS, f"search.steps={steps}"])
