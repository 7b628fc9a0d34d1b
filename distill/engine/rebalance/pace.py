"""How fast the units go: every rank says what a step of each of its units takes, rank 0 reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from distill.distributed.store import Control
from distill.training.trainer import BlockTrainer, Reading

MOMENTS = 2  # tensors of an optimizer's state for each of the weights, at most


class Pace(NamedTuple):
    """Seconds of one step of a unit on the rank that trains it now, and bytes of its weights and optimizer state."""

    step_s: float
    state_bytes: int


class PaceKeeper:
    """Takes the readings of a rank, says what they tell of its pace, and passes them on."""

    def __init__(self, control: Control, report: Callable[[Reading], None]) -> None:
        self._control, self._report = control, report
        self._begun: dict[int, Reading] = {}
        self._paces: dict[int, Pace] = {}

    def note(self, trainer: BlockTrainer, reading: Reading) -> None:
        """A unit's first reading on this rank only begins the count: it has the time to warm up in it."""
        begun = self._begun.setdefault(reading.unit, reading)
        steps = reading.step - begun.step
        if steps > 0:
            state_bytes = (1 + MOMENTS) * sum(parameter.nbytes for parameter in trainer.module.parameters())
            self._paces[reading.unit] = Pace((reading.seconds - begun.seconds) / steps, state_bytes)
            self._control.set(f"pace/{self._control.rank}", self._paces)
        self._report(reading)


def paces_of(control: Control, rank: int) -> Mapping[int, Pace]:
    """Return what `rank` has said of its units so far."""
    return {int(unit): Pace(*pace) for unit, pace in (control.get(f"pace/{rank}") or {}).items()}
