"""Times programs in one runtime at one batch size, each once: what is known already is looked up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from distill.deployment.measure import LIMIT_S, Timing, beside, difference_key, in_turn, piece_key, summary
from distill.deployment.runtimes import Runtime, Source
from distill.deployment.tables import Timings

log = logging.getLogger(__name__)

DOUBTFUL = 0.03  # standard error of a median, as a share of it, that is told where time was up
SAME = Timing(0.0, 0.0, 0.0, 0.0, 0)  # the difference of what computes the same


@dataclass(frozen=True)
class Piece:
    """A program, a batch for it, and what it is in words."""

    source: Source
    sample: Tensor
    what: str

    @property
    def key(self) -> str:
        """What its timing is kept under."""
        return piece_key(self.source.key, len(self.sample))


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Takes timings in `runtime` and keeps them in `timings`; no more than `limit_s` seconds for a program."""

    runtime: Runtime
    timings: Timings
    limit_s: float = LIMIT_S

    def alone(self, piece: Piece) -> Timing:
        """Return the milliseconds of a program."""
        found = self.timings.get(piece.key, piece.what)
        if found is None:
            (seconds,) = in_turn([self.runtime.start(piece.source, piece.sample)], limit_s=self.limit_s)
            self.timings.put(piece.key, found := summary(seconds))
        return found

    def calibrate(self, base: Piece, *others: Piece) -> None:
        """Time programs in the same rounds as `base`, so that all are known in its milliseconds, whenever each is timed
        again beside others."""
        unknown = {one.source.key: one for one in others if self.timings.get(one.key, one.what) is None}
        unknown.pop(base.source.key, None)
        if unknown:
            self._time(base, [*unknown.values()])

    def differences(
        self, base: Source, sources: Mapping[str, Sequence[Source]], sample: Tensor
    ) -> dict[str, list[Timing]]:
        """Return by how much programs take longer than `base`, by what they are in words; what is not known is timed,
        all in turn."""

        def known(source: Source, what: str) -> Timing | None:
            key = difference_key(*(piece_key(one.key, len(sample)) for one in (source, base)))
            return SAME if source.key == base.key else self.timings.get(key, what)

        unknown = {
            one.key: Piece(one, sample, what)
            for what, several in sources.items()
            for one in several
            if known(one, what) is None
        }
        if unknown:
            self._time(Piece(base, sample, "the teacher's part"), [*unknown.values()])
        found = {what: [known(one, what) for one in several] for what, several in sources.items()}
        return {what: [one for one in several if one is not None] for what, several in found.items()}

    def _time(self, base: Piece, others: Sequence[Piece]) -> None:
        """Time programs in turn, and keep how long each takes and by how much it takes longer than the first."""
        known = self.timings.get(base.key, base.what)
        own, *rest = in_turn(
            [self.runtime.start(one.source, one.sample) for one in (base, *others)], limit_s=self.limit_s
        )
        if known is None:
            self.timings.put(base.key, known := summary(own))
        _tell_unsettled([base, *others], [own, *rest])
        for one, seconds in zip(others, rest, strict=True):
            alone, difference = beside(seconds, own, known.median_ms)
            if self.timings.get(one.key, one.what) is None:
                self.timings.put(one.key, alone)
            self.timings.put(difference_key(one.key, base.key), difference)


def _tell_unsettled(pieces: Sequence[Piece], rounds: Sequence[Sequence[float]]) -> None:
    """Warn where time was up before every median was known well enough."""
    errors = {one.what: summary(seconds).error for one, seconds in zip(pieces, rounds, strict=True)}
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] > DOUBTFUL:
        log.warning(
            "latency: %s is known to %.0f %% only, when time was up (%d rounds): measure on a quiet machine",
            worst, 100 * errors[worst], len(rounds[0]),
        )  # fmt: skip
