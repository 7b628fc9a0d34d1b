"""Times programs in one runtime at one batch size, each once: what is known already is looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from distill.deployment.measure import LIMIT_S, Timing, difference_key, in_turn, over, piece_key, summary
from distill.deployment.runtimes import Runtime, Source
from distill.deployment.tables import Timings

SAME = Timing(0.0, 0.0, 0.0, 0.0, 0)  # the difference of what computes the same


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Takes timings in `runtime` and keeps them in `timings`; no more than `limit_s` seconds for a program."""

    runtime: Runtime
    timings: Timings
    limit_s: float = LIMIT_S

    def alone(self, source: Source, sample: Tensor, what: str) -> Timing:
        """Return the milliseconds of a program on a batch like `sample`; `what` it is, in words."""
        key = piece_key(source.key, len(sample))
        if self.timings.get(key, what) is None:
            self._time([source], sample)
        found = self.timings.get(key, what)
        assert found is not None, key
        return found

    def differences(
        self, base: Source, sources: Mapping[str, Sequence[Source]], sample: Tensor
    ) -> dict[str, list[Timing]]:
        """Return by how much programs take longer than `base`, by what they are in words; what is not known is timed,
        all in turn."""

        def known(source: Source, what: str) -> Timing | None:
            key = difference_key(*(piece_key(one.key, len(sample)) for one in (source, base)))
            return SAME if source.key == base.key else self.timings.get(key, what)

        unknown = {one.key: one for what, several in sources.items() for one in several if known(one, what) is None}
        if unknown:
            self._time([base, *unknown.values()], sample)
        found = {what: [known(one, what) for one in several] for what, several in sources.items()}
        return {what: [one for one in several if one is not None] for what, several in found.items()}

    def _time(self, sources: Sequence[Source], sample: Tensor) -> None:
        """Time programs in turn, and keep how long each takes and by how much it takes longer than the first."""
        rounds = in_turn([self.runtime.start(source, sample) for source in sources], limit_s=self.limit_s)
        keys = [piece_key(source.key, len(sample)) for source in sources]
        for key, seconds in zip(keys, rounds, strict=True):
            self.timings.put(key, summary(seconds))
        for key, seconds in zip(keys[1:], rounds[1:], strict=True):
            self.timings.put(difference_key(key, keys[0]), over(seconds, rounds[0]))
