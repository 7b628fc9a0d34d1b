"""What is left of a budget becomes epochs of fine-tuning, or none with a warning."""

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest

from distill.errors import DistillError
from distill.job import finetune, time_budget

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


def test_steps_that_are_faster_than_plain_ones_are_more() -> None:
    plain, faster = (time_budget._epochs(context_of(500.0), DATASET, times)["steps"] for times in (1.0, 2.0))
    assert 1.9 * plain < faster < 2 * plain + 2


def test_a_later_attempt_expects_the_steps_that_the_first_did() -> None:
    context: Any = context_of(500.0)
    said: dict[str, int] = {}
    context.leads, context.control = True, SimpleNamespace(set=said.__setitem__, wait=lambda key, **_: said[key])
    known = {time_budget.BLOCKS: KNOWN}
    context.run.result = known.get
    assert time_budget.expected_steps(context, DATASET) > 300
    known[time_budget.EPOCHS] = {"expected": 7}
    assert time_budget.expected_steps(context, DATASET) == 7


def test_programs_are_kept_aside() -> None:
    none, all_of_them = (
        time_budget._epochs(context_of(600.0, programs=programs), DATASET) for programs in ((), ("pt2", "onnx", "int8"))
    )
    assert all_of_them["after_s"] > none["after_s"] + 3 * KNOWN["export_s"]  # type: ignore[operator]


def test_no_time_is_no_epoch_and_told(caplog: pytest.LogCaptureFixture) -> None:
    context = context_of(20.0, gone_s=30.0)
    found = time_budget._told(context, time_budget._epochs(context, DATASET))
    assert (found["steps"], found["epochs"]) == (0, 0.0)
    assert "budget.seconds=20: no time is left to fine-tune in" in caplog.text


def test_a_sparse_student_that_no_time_is_left_for_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "_finetune", lambda *_: None)
    context = context_of(20.0)
    context.completed, context.run.path = lambda _: None, "run"
    context.config.finetune.sparsity = 0.5
    nothing: Any = None
    with pytest.raises(DistillError, match=r"sparsity=0\.5: budget\.seconds=20 leaves no time for it"):
        finetune.finetune_student(context, nothing, nothing, nothing, start="recalibrated")


@pytest.mark.parametrize(
    ("seconds", "record", "epochs"), [(None, None, 2.0), (9.0, None, 2.0), (9.0, {"epochs": 0.0}, 0.0)]
)
def test_the_epochs_of_a_run_are_those_asked_for_or_decided(
    seconds: float | None, record: dict[str, float] | None, epochs: float
) -> None:
    config: Any = SimpleNamespace(budget=SimpleNamespace(seconds=seconds), finetune=SimpleNamespace(epochs=2.0))
    run: Any = SimpleNamespace(result=lambda _: record)
    assert time_budget.epochs_of(config, run) == epochs
