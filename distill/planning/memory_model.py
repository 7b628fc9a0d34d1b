"""How much memory every rank of a plan needs at most: arithmetic on bytes, for plans that fit. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise

from distill.planning.network import RING_SLOTS

TEACHER_TENSORS = 3  # activations of the largest size that are alive inside a teacher block


@dataclass(frozen=True)
class Memory:
    """What decides how much memory a rank needs, in bytes; of one batch where it depends on that.

    `resident` is what every rank has before training: teacher, data and, on the CPU, the program itself. By a unit's
    number: `student` is the weights and all that is kept for them (gradients, optimizer, the last finite state), `step`
    what is alive during one step, `ends` its boundaries (where they are not given, those of the block of the same
    number). `boundary` is by boundary, as they travel. `held` is what the allocator does not give back
    while blocks train, `limit` what a rank may have.

    Captured graphs keep copies of what goes in and, on every one of `lanes`, the memory of the largest step; the
    teacher's, of which there are up to `teacher_graphs`, keep what they have found too. Both are 0 without graphs.
    """

    resident: int
    student: tuple[int, ...]
    step: tuple[int, ...]
    boundary: tuple[int, ...]
    window: int
    held: int = 0
    limit: int | None = None
    ends: tuple[tuple[int, int], ...] = ()
    lanes: int = 0
    teacher_graphs: int = 0

    def activations(self, units: Iterable[int]) -> int:
        """Return the bytes of the boundaries that training these units needs, shared ones once."""
        return self.sum_of({boundary for unit in units for boundary in self._ends_of(unit)})

    def _ends_of(self, unit: int) -> tuple[int, int]:
        return self.ends[unit] if self.ends else (unit, unit + 1)

    def sum_of(self, boundaries: Collection[int]) -> int:
        return sum(self.boundary[boundary] for boundary in boundaries)

    def students(self, units: Collection[int]) -> int:
        """Return the bytes of the students of these units, of the largest of their steps and of what is held."""
        if not units:
            return 0
        inputs = sum(self.activations([unit]) for unit in units) if self.lanes else 0
        return sum(self.student[unit] for unit in units) + inputs + self._steps(units) + self.held

    def _steps(self, units: Iterable[int]) -> int:
        """Bytes of the largest step, on every lane where there are lanes: units go round them."""
        lanes: dict[int, int] = {}
        for unit in units:
            lane = unit % max(1, self.lanes)
            lanes[lane] = max(lanes.get(lane, 0), self.step[unit])
        return sum(lanes.values())

    def teaching(self, boundaries: int) -> int:
        """Return the bytes that running the teacher takes where the boundaries that are kept have so many."""
        graphs = self.teacher_graphs * (self.boundary[0] + boundaries)
        return TEACHER_TENSORS * max(self.boundary) + boundaries + graphs

    @property
    def measuring(self) -> int:
        """Bytes that measuring costs takes besides what is resident: all students are there, and each takes a step. On
        a GPU (`lanes`) whole batches are kept, of two passes."""
        everything = range(len(self.student))
        boundaries = self.boundary[0] + max(map(sum, pairwise(self.boundary)))
        if self.lanes:
            boundaries = 2 * sum(self.boundary)
        return self.students(everything) + self.teaching(boundaries)

    def receiving(self, boundaries: int) -> int:
        """Return the bytes of a receiver's buffers for batches of so many bytes."""
        return RING_SLOTS * boundaries

    def sending(self, boundaries: int) -> int:
        """Return the bytes of batches that wait for a receiver, and of its buffers, which its host's ranks share."""
        return (self.window + RING_SLOTS) * boundaries

    def alone(self, units: Collection[int]) -> int:
        """Return the bytes of a rank that runs the teacher for its own units."""
        return self.resident + self.students(units) + (self.teaching(self.activations(units)) if units else 0)

    def least(self, units: Iterable[int]) -> int:
        """Return the bytes that, whatever the plan, some rank takes when it trains one of these units or more: where
        the teacher runs, before there is a student."""
        return self.resident + min(self.teaching(self.activations([unit])) for unit in units)

    def room(self, *, sends: bool) -> int | None:
        """Return the bytes that a rank has for units, each of them `block()`; a teacher rank may have to keep all
        boundaries for others. None where there is no limit."""
        if self.limit is None:
            return None
        everything = sum(self.boundary)
        teaching = self.teaching(everything) - everything + self.sending(everything) if sends else 0
        # The steps of all units, although they will not all be here: which will be is what is being decided.
        return self.limit - self.resident - self._steps(range(len(self.step))) - self.held - teaching

    def unit(self, unit: int) -> int:
        """Return the bytes that a unit adds at most to the rank that trains it, its step aside."""
        copies = 1 + RING_SLOTS + (1 if self.lanes else 0)
        return self.student[unit] + copies * self.activations([unit])
