"""What every rank did when: spans of time by kind, of bounded number, written per rank and merged for Perfetto.

Knows no torch: on a GPU the clock is handed in. Times are seconds of the epoch by each host's own clock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distill.storage.files import DamagedFileError, read_json, write_json

# stage: a stage of the job. Training thread: teacher (also reading what it computed before), student, wait (for a
# batch, or for a free slot at a receiver), record (the teacher's activations, before the stage).
# Background threads: send, receive, ledger (handing over, or recording, a finished block).
KINDS = ("stage", "teacher", "student", "wait", "record", "send", "receive", "ledger")
MAX_SPANS = 6000  # of one rank: about 0.6 MB; a quarter each for the first and the last steps, half for those between
WHOLE_STEPS = 32  # first and last steps that are kept whole, where that many fit
SAVE_EVERY_S = 30.0
KEPT_ATTEMPTS = 5


@dataclass(frozen=True)
class TimeSpan:
    """One thing that one thread did. `step` is the step whose batch it was for, where there is one."""

    start_s: float
    seconds: float
    kind: str
    name: str
    thread: int
    step: int | None = None


@dataclass(frozen=True)
class RankTrace:
    """A rank's spans as read from its file. `totals` hold the seconds and the count of every kind over all steps, also
    those whose spans were not kept (`steps_skipped`)."""

    rank: int
    generation: int
    started_s: float
    threads: dict[int, str]
    spans: list[TimeSpan]
    totals: dict[str, dict[str, float]]
    steps_skipped: int


class Clock(Protocol):
    """Where a span begins and ends: `mark` now, and later ask which second of the epoch that was."""

    def mark(self) -> Any: ...

    def passed(self, mark: Any) -> bool:
        """Return whether the work before a mark is done."""

    def seconds(self, mark: Any) -> float:
        """Return the time of a mark that has passed; marks are asked for in their order."""


class HostClock:
    """Wall-clock time that never runs backwards."""

    def __init__(self) -> None:
        self._offset = time.time() - time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, mark: float) -> float:
        return mark + self._offset


class _Labels(NamedTuple):
    kind: str
    name: str
    step: int | None


class Trace:
    """Records the spans of one rank, from any thread, in bounded memory: the first and the last steps whole, of those
    between every second, fourth, ... Seconds by kind are summed over all steps."""

    def __init__(self, rank: int = 0, generation: int = 0, *, device_clock: Clock | None = None) -> None:
        self._rank, self._generation = rank, generation
        self._host: Clock = HostClock()
        self._device = device_clock or self._host
        self.started_s = time.time()
        self._lock = threading.Lock()
        self._threads: dict[str, int] = {}  # by name: the numbers of threads that have ended are used again
        self._unread: deque[tuple[Any, Any, int, _Labels]] = deque()
        self._kept = _Sample()
        self._totals: dict[str, dict[str, float]] = {}
        self._saved = time.monotonic()
        self.stages: dict[str, float] = {}  # seconds of those that have ended

    @contextmanager
    def span(self, kind: str, name: str, step: int | None = None, *, on_device: bool = False) -> Iterator[None]:
        """Record what is inside. With `on_device` its times are those of the work it gives to the device."""
        clock = self._device if on_device else self._host
        start = clock.mark()
        try:
            yield
        finally:
            self._add(clock, start, clock.mark(), _Labels(kind, name, step))

    def since(self, start: float, kind: str, name: str, step: int | None = None) -> float:
        """Record what this thread has done since `start` (of time.perf_counter()); return its seconds."""
        end = self._host.mark()
        self._add(self._host, start, end, _Labels(kind, name, step))
        return float(end - start)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record a stage of the job."""
        start = time.perf_counter()
        with self.span("stage", name):
            yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def seconds(self, kind: str) -> float:
        """Return the seconds spent on a kind so far, in all threads."""
        with self._lock:
            self._read()
        return self._totals.get(kind, {}).get("seconds", 0.0)

    def save(self, folder: Path) -> None:
        """Write this rank's trace, if it has done anything; device work that still runs is left for the next time."""
        with self._lock:
            self._read()
            if not self._totals:
                return
            whole = RankTrace(
                self._rank, self._generation, self.started_s, {n: name for name, n in self._threads.items()},
                self._kept.spans(), self._totals, self._kept.steps_skipped,
            )  # fmt: skip
            content = asdict(whole)
        write_json(folder / f"rank{self._rank}.{self._generation}.json", content, indent=None)
        (folder / f"rank{self._rank}.{self._generation - KEPT_ATTEMPTS}.json").unlink(missing_ok=True)
        self._saved = time.monotonic()

    def save_sometimes(self, folder: Path) -> None:
        """Save at most every SAVE_EVERY_S, so that a rank that is killed leaves a trace."""
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self.save(folder)

    def _add(self, clock: Clock, start: Any, end: Any, labels: _Labels) -> None:
        with self._lock:
            thread = self._threads.setdefault(threading.current_thread().name, len(self._threads))
            if clock is self._host:
                self._keep(clock.seconds(start), clock.seconds(end), thread, labels)
            else:
                self._unread.append((start, end, thread, labels))
                self._read()

    def _read(self) -> None:
        """Keep the spans of device work that has come to its end."""
        while self._unread and self._device.passed(self._unread[0][1]):
            start, end, thread, labels = self._unread.popleft()
            self._keep(self._device.seconds(start), self._device.seconds(end), thread, labels)

    def _keep(self, start_s: float, end_s: float, thread: int, labels: _Labels) -> None:
        total = self._totals.setdefault(labels.kind, {"seconds": 0.0, "count": 0})
        total["seconds"] += end_s - start_s
        total["count"] += 1
        self._kept.add(TimeSpan(start_s, end_s - start_s, labels.kind, labels.name, thread, labels.step))


@dataclass
class _Sample:
    """A bounded choice of spans by their steps: the first and the last whole, of the others every `stride`-th."""

    stride: int = 1
    first: dict[int, list[TimeSpan]] = field(default_factory=dict)
    between: dict[int, list[TimeSpan]] = field(default_factory=dict)
    last: dict[int, list[TimeSpan]] = field(default_factory=dict)
    stepless: deque[TimeSpan] = field(default_factory=lambda: deque(maxlen=MAX_SPANS // 4))
    _passed: int = -1  # the highest step that has left `last`
    _left: int = 0  # how many have
    _spans_between: int = 0

    def add(self, span: TimeSpan) -> None:
        if span.step is None:
            self.stepless.append(span)
        elif span.step in self.first or (span.step > self._passed and self._first_has_room()):
            self.first.setdefault(span.step, []).append(span)
        elif span.step <= self._passed:
            self._keep_between(span.step, [span])
        else:
            self.last.setdefault(span.step, []).append(span)
            while _full(self.last) or len(self.last) > WHOLE_STEPS:
                self._passed = min(self.last)
                self._left += 1
                self._keep_between(self._passed, self.last.pop(self._passed))

    @property
    def steps_skipped(self) -> int:
        """How many steps left no span."""
        return max(0, self._left - len(self.between))

    def spans(self) -> list[TimeSpan]:
        """Return what was kept, in order of time."""
        parts = [self.stepless, *self.first.values(), *self.between.values(), *self.last.values()]
        return sorted((span for part in parts for span in part), key=lambda span: span.start_s)

    def _first_has_room(self) -> bool:
        return not self.last and len(self.first) < WHOLE_STEPS and not _full(self.first)

    def _keep_between(self, step: int, spans: Sequence[TimeSpan]) -> None:
        if step % self.stride:
            return
        self.between.setdefault(step, []).extend(spans)
        self._spans_between += len(spans)
        while self._spans_between > MAX_SPANS // 2 and len(self.between) > 1:
            self.stride *= 2
            self.between = {step: spans for step, spans in self.between.items() if step % self.stride == 0}
            self._spans_between = sum(map(len, self.between.values()))


def _full(steps: dict[int, list[TimeSpan]]) -> bool:
    return len(steps) > 2 and sum(map(len, steps.values())) > MAX_SPANS // 4


def read(run_dir: Path) -> list[RankTrace]:
    """Return the traces in a run directory, by attempt and rank; files that are damaged are passed over."""
    found = []
    for file in (run_dir / "traces").glob("rank*.json"):
        try:
            raw = read_json(file)
            raw["spans"] = [TimeSpan(**span) for span in raw["spans"]]
            raw["threads"] = {int(thread): name for thread, name in raw["threads"].items()}
            found.append(RankTrace(**raw))
        except (DamagedFileError, TypeError, KeyError):
            continue
    return sorted(found, key=lambda trace: (trace.generation, trace.rank))
