"""Fine-tuning within a deadline: its steps follow from those that were timed, and a later attempt has the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.job import timekeeper
from distill.storage.files import read_json, write_json
from distill.training.companions import Companion
from distill.training.horizon import Horizon

PASSES = {"step": 1.0, "teacher": 0.1, "student": 0.1}


class Clock:
    """Time that passes by what is said."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    perf_counter = time


class Store(dict[str, Any]):
    def set(self, key: str, value: Any) -> None:
        self[key] = value

    def wait(self, key: str, *, peer: int, purpose: str) -> Any:
        return self[key]


def context_of(folder: Path, *, deadline_s: float | None, seconds: float | None = 500.0) -> Any:
    run = SimpleNamespace(path=folder, result=lambda _: {"passes": PASSES})
    config = SimpleNamespace(budget=SimpleNamespace(seconds=seconds))
    device = SimpleNamespace(type="cpu")
    return SimpleNamespace(
        config=config, run=run, control=Store(), leads=True, device=device, world_size=1, deadline_s=deadline_s
    )


DATASET: Any = SimpleNamespace(steps_per_epoch=50, num_validation=100, batch_size=10)  # judged in a second


def trained(companion: Companion, horizon: Horizon, clock: Clock, *, seconds: float) -> int:
    """Go through the steps, each of which takes so long; return how many there were."""
    step = 0
    while step < horizon.total:
        clock.now += seconds
        companion.after_step(step, horizon.total)
        step += 1
        if step % 50 == 0 or step >= horizon.total:
            clock.now += 1.0
    return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timekeeper, "time", found)
    return found


@pytest.mark.parametrize("planned", [20, 100, 400])
@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.0])
def test_it_ends_in_time_whatever_was_planned(tmp_path: Path, clock: Clock, planned: int, seconds: float) -> None:
    context, horizon = context_of(tmp_path, deadline_s=clock.now + 200), Horizon(planned)
    (keeper,) = timekeeper.timekeepers(context, DATASET, horizon)
    start = clock.now
    trained(keeper, horizon, clock, seconds=seconds)
    assert 190 <= clock.now - start <= 203


def test_a_later_attempt_has_the_same_steps_whatever_it_takes(tmp_path: Path, clock: Clock) -> None:
    context, horizon = context_of(tmp_path, deadline_s=clock.now + 200), Horizon(100)
    (keeper,) = timekeeper.timekeepers(context, DATASET, horizon)
    steps = trained(keeper, horizon, clock, seconds=1.5)
    assert steps != 100
    again = Horizon(100)
    (keeper,) = timekeeper.timekeepers(context_of(tmp_path, deadline_s=None), DATASET, again)
    assert trained(keeper, again, clock, seconds=7.0) == steps


def test_after_a_setback_steps_are_revised_as_a_later_attempt_revises_them(tmp_path: Path, clock: Clock) -> None:
    def course(deadline_s: float | None) -> list[int]:
        """Go back to the start after 30 steps; return the steps in all as each of the next 30 finds them."""
        horizon = Horizon(100)
        (keeper,) = timekeeper.timekeepers(context_of(tmp_path, deadline_s=deadline_s), DATASET, horizon)
        for step in range(30):
            clock.now += 2.0
            keeper.after_step(step, horizon.total)
        horizon.total = 100
        found = []
        for step in range(30):
            clock.now += 2.0
            keeper.after_step(step, horizon.total)
            found.append(horizon.total)
        return found

    assert course(clock.now + 200) == course(None)


def test_steps_that_a_setback_repeats_do_not_count_as_slow_ones(tmp_path: Path, clock: Clock) -> None:
    context, horizon = context_of(tmp_path, deadline_s=clock.now + 200), Horizon(100)
    (keeper,) = timekeeper.timekeepers(context, DATASET, horizon)
    found = []
    for step in [*range(30), *range(49)]:
        clock.now += 1.0
        keeper.after_step(step, horizon.total)
        found.append(horizon.total)
    assert min(found[30:]) >= 150


def test_revisions_of_a_decision_that_was_lost_are_forgotten(tmp_path: Path, clock: Clock) -> None:
    write_json(tmp_path / timekeeper.FILE, {"totals": {4: 9}})
    timekeeper.timekeepers(context_of(tmp_path, deadline_s=clock.now + 200), DATASET, Horizon(100))
    assert not (tmp_path / timekeeper.FILE).exists()


def test_no_time_left_ends_it_after_a_step_that_is_known_as_the_last(tmp_path: Path, clock: Clock) -> None:
    context, horizon = context_of(tmp_path, deadline_s=clock.now + 5), Horizon(100)
    (keeper,) = timekeeper.timekeepers(context, DATASET, horizon)
    assert trained(keeper, horizon, clock, seconds=3.0) == timekeeper.FIRST + 1


def test_without_a_budget_nobody_keeps_time(tmp_path: Path) -> None:
    assert timekeeper.timekeepers(context_of(tmp_path, deadline_s=None, seconds=None), DATASET, Horizon(1)) == []


def test_a_damaged_record_of_revisions_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / timekeeper.FILE, {"totals": {4: 9}})
    assert read_json(tmp_path / timekeeper.FILE)["totals"] == {"4": 9}
    (tmp_path / timekeeper.FILE).write_text("{")
    horizon = Horizon(3)
    (keeper,) = timekeeper.timekeepers(context_of(tmp_path, deadline_s=None), DATASET, horizon)
    keeper.after_step(3, 3)
    assert horizon.total == 3
    assert "not revised as before" in caplog.text
