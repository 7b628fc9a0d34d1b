"""What is left of a budget becomes epochs of fine-tuning, or none with a warning."""

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from distill.job import time_budget

DATASET: Any = SimpleNamespace(steps_per_epoch=50, num_validation=100, num_test=200, batch_size=10)
KNOWN = {"passes": {"step": 1.0, "teacher": 0.1, "student": 0.1}, "export_s": 2.0}


def context_of(seconds: float, *, gone_s: float = 0.0, ranks: int = 1, programs: tuple[str, ...] = ()) -> Any:
    config = SimpleNamespace(
        budget=SimpleNamespace(seconds=seconds), deploy=SimpleNamespace(programs=programs),
        finetune=SimpleNamespace(epochs=2.0),
    )  # fmt: skip
    start = time.time() - gone_s
    return SimpleNamespace(
        config=config, world_size=ranks, started_s=start, trace=SimpleNamespace(started_s=start + 4.0),
        run=SimpleNamespace(result=lambda _: KNOWN), say=lambda _: None,
    )  # fmt: skip


def test_all_that_is_left_is_fine_tuned_in() -> None:
    found = time_budget._epochs(context_of(500.0, gone_s=100.0), DATASET)
    assert 370 < found["steps"] < 400 - found["after_s"]
    assert math.ceil(found["epochs"] * DATASET.steps_per_epoch) == found["steps"]


def test_ranks_share_steps_and_spend_together() -> None:
    alone, together = (time_budget._epochs(context_of(600.0, ranks=ranks), DATASET) for ranks in (1, 2))
    # what one rank does alone costs both
    assert 0.9 * alone["steps"] < together["steps"] < alone["steps"]


def test_programs_are_kept_aside() -> None:
    none, all_of_them = (
        time_budget._epochs(context_of(600.0, programs=programs), DATASET) for programs in ((), ("pt2", "onnx", "int8"))
    )
    assert all_of_them["after_s"] > none["after_s"] + 3 * KNOWN["export_s"]  # type: ignore[operator]


def test_no_time_is_no_epoch_and_told(caplog: pytest.LogCaptureFixture) -> None:
    found = time_budget._epochs(context_of(20.0, gone_s=30.0), DATASET)
    assert (found["steps"], found["epochs"]) == (0, 0.0)
    assert "budget.seconds=20: no time is left to fine-tune in" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "record", "epochs"), [(None, None, 2.0), (9.0, None, 2.0), (9.0, {"epochs": 0.0}, 0.0)]
)
def test_the_epochs_of_a_run_are_those_asked_for_or_decided(
    seconds: float | None, record: dict[str, float] | None, epochs: float
) -> None:
    config: Any = SimpleNamespace(budget=SimpleNamespace(seconds=seconds), finetune=SimpleNamespace(epochs=2.0))
    run: Any = SimpleNamespace(result=lambda _: record)
    assert time_budget.epochs_of(config, run) == epochs
