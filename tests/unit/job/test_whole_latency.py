"""Latencies of candidates against those of whole students."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from distill.config.compose import compose
from distill.errors import ConfigError
from distill.job.latency import tell_missed_latency
from distill.job.pool import Pool, find_pool, refuse_unreachable
from distill.job.problem import Problem
from distill.job.scores import Score
from distill.job.whole_latency import TRIES, corrected
from distill.teachers import build_architecture

SETTINGS = (
    "data=digits", "data.image_size=16", "data.batch_size=4", "search.budget.latency=0.5",
    "search.candidates=[{recipe: separable,rank: 1},{recipe: separable,rank: 2},{recipe: separable,rank: 3}]",
)  # fmt: skip
CONFIG = compose(SETTINGS)
TEACHER_MS = 18.0
SAVED = {"separable rank=1": -1.6, "separable rank=2": -1.2, "separable rank=3": -0.8}  # ms, by a block's chain
LOSSES = {"separable rank=1": 3.0, "separable rank=2": 2.0, "separable rank=3": 1.0}


def pool(chains: float) -> Pool:
    teacher = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10).eval()
    found = find_pool(CONFIG, (3, 16, 16), teacher, torch.device("cpu"))
    return found.with_amounts("latency", TEACHER_MS, [chains * SAVED[swap.label] for swap in found.swaps])


def outcome(really: Callable[[float], float], *, chains: float = 1.0) -> tuple[float, float, int]:
    """What is predicted in the end and what that student takes, where chains save so much, and whole students really()
    of it; and how many of these were timed."""
    before, asked, told = pool(chains), list[Sequence[int]](), list[str]()
    scores = [Score(0.1, LOSSES[swap.label]) for swap in before.swaps]

    def whole(numbers: Sequence[int]) -> float:
        return TEACHER_MS + really(sum(before.swaps[number].amounts["latency"] for number in numbers))

    def timed(numbers: Sequence[int]) -> float:
        asked.append(numbers)
        return whole(numbers)

    after = corrected(CONFIG, before, scores, timed, told.append)
    refuse_unreachable(CONFIG, after)
    problem = Problem.of(CONFIG, after, scores)
    (best,) = problem.best_few(1)
    assert len(told) <= len(asked)
    return problem.predicted(best)["latency"], whole(problem.swaps(best)), len(asked)


def test_where_latencies_add_up_one_student_is_timed() -> None:
    predicted, measured, timed = outcome(lambda saved: 1.01 * saved)
    assert timed == 1
    assert measured <= TEACHER_MS / 2
    assert measured == pytest.approx(predicted, rel=0.02)


def test_chains_that_save_too_little_hide_no_student_that_keeps_to_the_budget() -> None:
    _, measured, _ = outcome(lambda saved: 1.9 * saved, chains=0.5)
    assert 0.4 * TEACHER_MS < measured <= 0.515 * TEACHER_MS


@pytest.mark.parametrize("factor", [0.8, 1.5, 2.0])
def test_where_they_do_not_add_up_the_student_keeps_to_the_budget_and_uses_it(factor: float) -> None:
    predicted, measured, timed = outcome(lambda saved: factor * saved)
    assert 2 <= timed <= TRIES
    assert measured == pytest.approx(predicted, rel=0.03)
    assert 0.44 * TEACHER_MS < measured <= 0.515 * TEACHER_MS


def test_where_savings_are_not_even_in_proportion_it_comes_close() -> None:
    _, measured, _ = outcome(lambda saved: saved - 0.05 * saved**2)
    assert 0.42 * TEACHER_MS < measured <= 0.53 * TEACHER_MS


def test_what_is_out_of_reach_as_a_whole_is_refused_with_the_least_that_can_be_had() -> None:
    with pytest.raises(ConfigError, match=r"search\.budget\.latency: got .*; expected at least [0-9.]+ ms: the least"):
        outcome(lambda saved: 0.4 * saved)


@pytest.mark.parametrize(("student_ms", "told"), [(5.0, 0), (5.2, 0), (5.5, 1)])
def test_a_student_that_missed_its_latency_is_told(
    student_ms: float, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    measured = {"latency": student_ms, "latency_of_teacher": 10.0}
    budget = {"latency": {"asked": "10ms", "limit": 10.0}}  # half of what the teacher took when it was chosen
    tell_missed_latency(
        {"search": {"teacher": {"latency": 20.0}, "budgets": [{"budget": budget, "measured": measured}]}}
    )
    tell_missed_latency({"search": {"teacher": {}, "budgets": [{"budget": {"params": {}}, "measured": {}}]}})
    tell_missed_latency({})
    words = "search.budget.latency=10ms: the delivered student takes 0.550 of its teacher's time, 0.500 was asked for"
    assert [record.getMessage() for record in caplog.records] == [words] * told
