"""What another block in a network costs or saves in milliseconds, as it stands between its neighbours.

Runtimes fold batch norms, fuse operations over a block's edges and keep layouts of their own from one convolution to
the next; a block alone pays at both ends for what it does not in the network. So chains are timed: the teacher's block
before, the candidate, the teacher's block behind; and what counts is by how much that takes longer than with the
teacher's own block. The whole student is predicted to take what the teacher takes plus the sum of such differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.deployment.forms import forms_of
from distill.deployment.measure import LIMIT_S, Timing
from distill.deployment.runtimes import Runtime, Source
from distill.deployment.stopwatch import Piece, Stopwatch
from distill.deployment.tables import KeptHere, Timings

Place = int | tuple[int, int]  # a block by its index; or blocks in a row, from the first to one behind the last


@dataclass(frozen=True)
class Additivity:
    """A prediction for a whole student against what was measured."""

    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """By which share of what was measured the prediction is too high, or too low (negative)."""
        return self.predicted_ms / self.measured_ms - 1


class LatencyTable:
    """Latencies of one teacher's blocks and of candidates for them, on batches of `batch` images.

    `chain` is the teacher, cut; `teacher` the network itself. Timings are taken once and kept in `timings`: those of
    this machine, where nothing else is given.
    """

    def __init__(
        self,
        chain: Chain,
        teacher: nn.Module,
        runtime: Runtime,
        *,
        batch: int,
        timings: Timings | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        self.runtime, self.batch = runtime, batch
        self._chain, self._teacher = chain, teacher
        kept = KeptHere(runtime.environment) if timings is None else timings
        self._calibrated = False
        self._stopwatch = Stopwatch(runtime=runtime, timings=kept, limit_s=limit_s)

    def difference(self, place: Place, candidate: nn.Module) -> Timing:
        """Return by how many milliseconds the network takes longer (less: negative) with a candidate in the place of
        the teacher's block, in the form that is faster where it has several (forms.py)."""
        return self.differences(place, {"candidate": candidate})["candidate"]

    def differences(self, place: Place, candidates: Mapping[str, nn.Module]) -> dict[str, Timing]:
        """difference() of several candidates for one place, by name: those not known yet are timed in turn."""
        base, chains = self.chains(place, candidates)
        sample = self._sample(self._outer(place)[0])
        first, end = _span(place)
        names = [block.name for block in self._chain.blocks[first:end]]
        self._calibrate(Piece(base, sample, f"block {names[0]}" if len(names) == 1 else f"{names[0]} to {names[-1]}"))
        found = self._stopwatch.differences(base, chains, sample)
        return {name: min(forms, key=lambda one: one.median_ms) for name, forms in found.items()}

    def chains(self, place: Place, candidates: Mapping[str, nn.Module]) -> tuple[Source, dict[str, list[Source]]]:
        """Return the programs of the teacher's blocks at a place and of the candidates for it, in every form, between
        neighbours."""
        first, end = _span(place)
        outer = self._outer(place)
        before = [self._chain.block_module(block) for block in range(outer[0], first)]
        behind = [self._chain.block_module(block) for block in range(end, outer[1])]
        own = [self._chain.block_module(block) for block in range(first, end)]
        sample = self._sample(outer[0])

        def source(*inner: nn.Module) -> Source:
            return self.runtime.source(nn.Sequential(*before, *inner, *behind), sample)

        return source(*own), {
            name: [source(form) for form in forms_of(candidate)] for name, candidate in candidates.items()
        }

    @cached_property
    def teacher(self) -> Timing:
        """Milliseconds of the whole teacher."""
        return self._stopwatch.alone(self._whole_teacher)

    @cached_property
    def _whole_teacher(self) -> Piece:
        return Piece(self.whole(self._teacher)[0], self._sample(0), "the teacher")

    def predict(self, choices: Mapping[Place, nn.Module]) -> float:
        """Return the milliseconds that the teacher would take with these candidates in its blocks' places."""
        return self.teacher.median_ms + sum(self.difference(place, one).median_ms for place, one in choices.items())

    def additivity(self, choices: Mapping[Place, nn.Module], student: nn.Module) -> Additivity:
        """Return how well predict() does on the network that was assembled from these candidates."""
        return Additivity(self.predict(choices), self.measured(student))

    def measured(self, student: nn.Module) -> float:
        """Return the milliseconds of a whole network, measured beside the teacher, whose own drift since it was timed
        first is taken out."""
        base, sample = self._whole_teacher.source, self._whole_teacher.sample
        found = self._stopwatch.differences(base, {"the student": self.whole(student)}, sample)
        return self.teacher.median_ms + min(one.median_ms for one in found["the student"])

    def whole(self, network: nn.Module) -> list[Source]:
        """Return the programs of a whole network, one for every form."""
        return [self.runtime.whole(form, self._sample(0)) for form in forms_of(network)]

    def calibration(self) -> list[Piece]:
        """Return what is timed in the same rounds before any candidate, for all to be in the same milliseconds: the
        teacher, and each of its blocks between its neighbours."""
        places = [(block.index, f"block {block.name}") for block in self._chain.blocks if self._runs_alone(block.index)]
        pieces = [Piece(self.chains(at, {})[0], self._sample(self._outer(at)[0]), what) for at, what in places]
        return [self._whole_teacher, *pieces]

    def _calibrate(self, base: Piece) -> None:
        """Have the chain of the teacher's own blocks in the teacher's milliseconds."""
        if not self._calibrated:
            self._stopwatch.calibrate(*self.calibration())
            self._calibrated = True
        self._stopwatch.calibrate(self._whole_teacher, base)

    def _runs_alone(self, block: int) -> bool:
        """Whether a block can be taken out of the network: not what lies between listed modules."""
        if self._chain.divisible:
            return True
        try:
            self._chain.block_module(block)
        except NotImplementedError:
            return False
        return True

    def _outer(self, place: Place) -> tuple[int, int]:
        """Return where a chain begins and ends: a block further at both sides, where blocks follow one another."""
        first, end = _span(place)
        if not self._chain.divisible:
            return first, end
        return max(0, first - 1), min(len(self._chain.blocks), end + 1)

    def _sample(self, boundary: int) -> Tensor:
        form = self._chain.boundaries[boundary].of_rows(self.batch)
        return torch.randn(form.shape, generator=torch.Generator().manual_seed(0))


def _span(place: Place) -> tuple[int, int]:
    return (place, place + 1) if isinstance(place, int) else place
