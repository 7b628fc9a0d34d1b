"""Revises the steps of fine-tuning while it runs, so that it ends in time (budget.seconds)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch

from distill.data import Dataset
from distill.job.context import Context
from distill.job.time_budget import BLOCKS, validation_s
from distill.planning.time_shares import Passes, steps_within
from distill.storage.files import DamagedFileError, read_json, write_json
from distill.training.companions import Companion
from distill.training.horizon import Horizon

log = logging.getLogger(__name__)

FILE = "horizon.json"  # the revisions: steps in all, by the step after which they were revised
FIRST = 4  # steps, before which none is typical
PART = 8  # revised when this part of what is left has passed


def timekeepers(context: Context, dataset: Dataset, horizon: Horizon) -> list[Companion]:
    """Return what keeps fine-tuning to its deadline, where there is one. A later attempt revises as the first did."""
    if context.config.budget.seconds is None:
        return []
    if context.deadline_s is None:
        return [Again(horizon, _revisions(context))]
    return [Timekeeper(context, dataset, horizon)]


def _revisions(context: Context) -> dict[int, int]:
    """Return the revisions of an earlier attempt, the same on every rank."""
    if context.leads:
        try:
            found = read_json(context.run.path / FILE) or {"totals": {}}
        except DamagedFileError as damage:
            log.warning("finetune: its steps are not revised as before: %s", damage)
            found = {"totals": {}}
        context.control.set("horizon/again", found["totals"])
    totals = context.control.wait("horizon/again", peer=0, purpose="steps of fine-tuning")
    return {int(step): total for step, total in totals.items()}


class Again(Companion):
    """Revises the steps as an earlier attempt has."""

    def __init__(self, horizon: Horizon, totals: Mapping[int, int]) -> None:
        self._horizon, self._totals = horizon, totals

    def after_step(self, step: int, total: int) -> None:
        self._horizon.total = self._totals.get(step + 1, self._horizon.total)


class Timekeeper(Companion):
    """Revises the steps by how long those since the last revision took, more and more often towards the end.

    Rank 0 decides, and all do as it says.
    """

    def __init__(self, context: Context, dataset: Dataset, horizon: Horizon) -> None:
        assert context.deadline_s is not None
        self._context, self._dataset, self._horizon = context, dataset, horizon
        self._deadline_s = context.deadline_s
        self._epoch_s = validation_s(context, dataset, Passes(**context.run.result(BLOCKS)["passes"]))
        self._next = FIRST
        self._since: tuple[int, float] | None = None
        self._totals: dict[int, int] = {}
        if context.leads:  # those of an attempt whose decision was lost
            (context.run.path / FILE).unlink(missing_ok=True)

    def after_step(self, step: int, total: int) -> None:
        done = step + 1
        self._horizon.total = self._totals.get(done, self._horizon.total)  # after a setback: as Again will
        if self._since is not None and done <= self._since[0]:
            self._since = None  # a setback: what has passed is not those steps alone
        if done % self._dataset.steps_per_epoch == 0:
            self._since = None  # what comes now is no step
        if done >= self._next:
            self._revise(done)
        if self._since is None and done % self._dataset.steps_per_epoch:
            self._since = done, self._now()

    def _revise(self, done: int) -> None:
        if self._context.leads:
            told = self._horizon.total if self._since is None else self._possible(done, *self._since)
            self._context.control.set(f"horizon/{done}", told)
        total = self._context.control.wait(f"horizon/{done}", peer=0, purpose="steps of fine-tuning")
        if total != self._horizon.total:
            self._horizon.total = total
            self._totals[done] = total
            if self._context.leads:
                write_json(self._context.run.path / FILE, {"totals": self._totals})
        self._since = None
        self._next = done + max(1, (total - done) // PART)

    def _possible(self, done: int, since: int, then: float) -> int:
        """Return the steps in all that there is time for, by those since then."""
        now = self._now()
        left = self._deadline_s - time.time()
        more = steps_within(
            left,
            step_s=(now - then) / (done - since),
            epoch_s=self._epoch_s,
            done=done,
            steps_per_epoch=self._dataset.steps_per_epoch,
        )
        total = done + max(1, more)  # the last step has to be known as such: what is to be complete then, completes
        # No longer than planned in the last part: an epoch that begins anew at its old end would be judged twice.
        return min(total, self._horizon.total) if PART * (self._horizon.total - done) < done else total

    def _now(self) -> float:
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)
        return time.perf_counter()
