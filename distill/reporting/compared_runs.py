"""One run of a comparison: what it is called, what differs from the others, its figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.observability.energy.joules import job_joules
from distill.observability.numbers import finite, show, show_seconds, show_short
from distill.reporting.energy import show_joules
from distill.reporting.latency import Speed, in_eager, in_runtime
from distill.reporting.run import NoRunError, Run
from distill.reporting.tables import STUDENTS

# What a speed-up is over, in the lines of its heading.
SAME_JOB, ANY_JOB = "over\nthe fewest ranks\nof the same job", "over\nthe slowest run"
NOT_TOLD = ("run.", "launch.", "checkpoint.", "distill.log_every", "plan.timeout_s")
MOST_DIFFERENCES = 6


@dataclass
class Line:
    """One run of a comparison. `run` is None where there is none; figures are None where they are not known."""

    number: int
    name: str
    state: str
    run: Run | None = None
    differs: str = ""
    speed_up: float | None = None
    eager: bool = True  # whether latencies are those of eager PyTorch

    def student(self, key: str) -> float | None:
        return self._figure("student", key)

    def teacher(self, key: str) -> float | None:
        return self._figure("teacher", key)

    def _figure(self, side: str, key: str) -> float | None:
        return (
            finite((self.run.metrics.get(side) or {}).get(key)) if self.run is not None and self.run.finished else None
        )

    def speed(self, batch: int) -> Speed:
        """Both networks' milliseconds of a batch, in the runtime where all runs have them."""
        metrics = self.run.metrics if self.run is not None and self.run.finished else {}
        known = in_eager(metrics) if self.eager else in_runtime(metrics)
        return next((one for one in known if one.batch == batch), Speed(batch, None, None))

    @property
    def seconds(self) -> float | None:
        """Seconds of the distill stage, where it is complete."""
        return finite(self.run.part("distill").get("seconds")) if self.run is not None else None

    @property
    def ranks(self) -> int | None:
        return self.run.world_size if self.run is not None else None

    @property
    def title(self) -> str:
        return f"{self.number} {self.name}"

    def figures(self) -> dict[str, str]:
        """Return what the tables say of it, by heading."""
        a, b = self.teacher("top1"), self.student("top1")
        distill: dict[str, Any] = self.run.part("distill") if self.run is not None else {}
        stages = self.run.stage_seconds if self.run is not None else {}
        joules = job_joules(self.run.energy) if self.run is not None else None
        return {
            "ranks": "-" if self.ranks is None else str(self.ranks),
            "top-1": show(b, "{:.2f} %"),
            "to\nteacher": "-" if a is None or b is None else f"{b - a:+.2f}",
            "params": show_short(self.student("params")),
            "FLOP": show_short(self.student("flops")),
            "ms of\n1 image": show(self.speed(1).student, "{:.2f}"),
            "ms of\n64 images": show(self.speed(64).student, "{:.1f}"),
            "distill": show_seconds(self.seconds),
            "all\nstages": show_seconds(sum(stages.values()) if stages else None),
            "images/s": show_short(distill.get("images_per_second")),
            "speed-up": "-" if self.speed_up is None else f"{self.speed_up:.2f}x",
            "energy": show_joules(joules) if self.run is not None and self.run.finished else "-",
        }

    def cells(self) -> tuple[str, ...]:
        return (self.title, self.differs or "-", self.state, *self.figures().values())


def compared(run_dirs: Sequence[Path]) -> tuple[list[Line], str]:
    """Return the runs and what their speed-up is over."""
    found = []
    for number, path in enumerate(run_dirs, start=1):
        name = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
        try:
            run = Run(path)
        except NoRunError:
            found.append(Line(number, name, "missing"))
            continue
        delivered = STUDENTS.get(str((run.metrics.get("student") or {}).get("delivered")))
        done = f"finished, {delivered}" if delivered else "finished"
        state = done if run.finished else f"{'failed' if run.errors else 'unfinished'} in {run.current_stage}"
        found.append(Line(number, name, state, run))
    finished = [line for line in found if line.run is not None and line.run.finished]
    for line in found:
        line.eager = not all(in_runtime(one.run.metrics) for one in finished if one.run is not None)
    _tell_differences([line for line in found if line.run is not None])
    return found, _set_speed_ups(found)


def _tell_differences(lines: Iterable[Line]) -> None:
    """Write at every run the settings that are not the same in all."""
    settings = [(line, line.run.settings) for line in lines if line.run is not None and line.run.settings]
    keys = sorted({key for _, one in settings for key in one if not key.startswith(NOT_TOLD)})
    differing = [key for key in keys if len({repr(one.get(key)) for _, one in settings}) > 1]
    for line, one in settings:
        told = [f"{key}={one.get(key)}" for key in differing[:MOST_DIFFERENCES]]
        line.differs = ", ".join(told + ["..."] * (len(differing) > MOST_DIFFERENCES))


def _set_speed_ups(lines: Sequence[Line]) -> str:
    """Give every run its speed-up over the fewest ranks that computed the same (the same fingerprint); where no two
    did, over the slowest run of all. Returns which of the two, in words, or "" where there is none."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line.run is not None and line.seconds:
            groups[str(line.run.metrics.get("fingerprint") or line.name)].append(line)
    alike = [group for group in groups.values() if len(group) > 1]
    measured = [line for group in groups.values() for line in group]
    words = SAME_JOB if alike else ANY_JOB
    if not alike and len(measured) > 1:
        alike = [measured]
    for group in alike:
        slowest = max(group, key=lambda line: line.seconds or 0.0)
        fewest = min(group, key=lambda line: (line.ranks or 1, -(line.seconds or 0.0)))
        base = fewest if words == SAME_JOB else slowest
        for line in group:
            line.speed_up = (base.seconds or 0.0) / (line.seconds or 1.0)
    return words if alike else ""
