"""Runs that take turns on the machine: while one trains the others are stopped, so that a machine that is fast now and
slow a minute later is so for all of them alike.

Every run starts alone and is stopped as soon as its plan is written; then each goes on for a slice of time in turn, its
slices as long as its predicted makespan is beside the others', so that all end at about the same time. Linux only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from measure import finish, process_tree, read, start

from distill.observability import trace

STAGE = Path("stages") / "distill.json"
ROUNDS_OF_SLICES = 15
SHORTEST_SLICE_S = 0.5
WORK = ("teacher", "student", "wait")

Start: TypeAlias = Callable[[Path], Sequence[subprocess.Popen[bytes]]]  # run directory -> the commands of that run


@dataclass
class Turns:
    """One or several runs side by side, which train at the same time while everything else is stopped."""

    runs: Mapping[str, Start]  # by name
    folder: Path  # with a run directory of every name
    _slices: list[tuple[float, float]] = field(default_factory=list)  # begin and end, seconds of the epoch
    _processes: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    def start(self) -> None:
        """Start the runs, and stop them as soon as all have planned."""
        begin = time.time()
        self._processes = [(name, one) for name, begun in self.runs.items() for one in begun(self.folder / name)]
        while not all((self.folder / name / "plan.json").exists() for name in self.runs):
            if any(process.poll() is not None for _, process in self._processes):
                self.finish()
                raise SystemExit(f"a run in {self.folder} ended without a plan")
            time.sleep(0.002)
        self._signal(signal.SIGSTOP)
        self._slices.append((begin, time.time()))

    @property
    def predicted_s(self) -> float:
        return max(float(read(self.folder / name / "plan.json")["predicted_makespan_s"]) for name in self.runs)

    def go_on(self, seconds: float) -> bool:
        """Run for a slice of time; return whether there is more to do."""
        begin = time.time()
        self._signal(signal.SIGCONT)
        while not self._ended() and time.time() < begin + seconds:
            time.sleep(0.005)
        ended = self._ended()
        if not ended:
            self._signal(signal.SIGSTOP)
        self._slices.append((begin, time.time()))
        return not ended

    def finish(self) -> None:
        for name, process in self._processes:
            finish(process, self.folder / name)

    def results(self) -> dict[str, dict[str, Any]]:
        """Return every run's record of the stage with its times counted in slices alone: from the first batch to the
        last block in the ledger."""
        return {name: self._result(name) for name in self.runs}

    def _result(self, name: str) -> dict[str, Any]:
        ranks = trace.read(self.folder / name)
        assert all(rank.steps_skipped == 0 for rank in ranks), "too many steps: the trace does not hold all of them"
        begin = min(span.start_s for rank in ranks for span in rank.spans if span.kind in WORK)
        end = max(span.start_s + span.seconds for rank in ranks for span in rank.spans if span.kind == "ledger")
        seconds = self._active(begin, end)
        busy = {rank.rank: self._busy(rank) for rank in ranks}
        stage = read(self.folder / name / STAGE)
        idle = [1 - busy.get(rank, 0.0) / seconds for rank in range(stage["world_size"])]
        return dict(stage, seconds=seconds, idle_share=idle)

    def _busy(self, rank: trace.RankTrace) -> float:
        spans = [span for span in rank.spans if span.kind in WORK]
        if not spans:
            return 0.0
        own = self._active(min(span.start_s for span in spans), max(span.start_s + span.seconds for span in spans))
        return own - sum(self._active(s.start_s, s.start_s + s.seconds) for s in spans if s.kind == "wait")

    def _active(self, begin: float, end: float) -> float:
        return sum(max(0.0, min(end, stop) - max(begin, go)) for go, stop in self._slices)

    def _ended(self) -> bool:
        return all(process.poll() is not None for _, process in self._processes)

    def kill(self) -> None:
        """End what still runs; a stopped process does not end by itself."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for _, process in self._processes:
            for pid in process_tree(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def here(*job: str) -> Start:
    """Return what starts `python -m distill` with these overrides."""
    return lambda run_dir: [start(*job, run_dir=run_dir)]


def take_turns(contestants: Sequence[Turns]) -> None:
    """Run them all to the end, in turns, every other round in the opposite order."""
    try:
        for one in contestants:
            one.start()
        slice_s = {id(one): max(SHORTEST_SLICE_S, one.predicted_s / ROUNDS_OF_SLICES) for one in contestants}
        going = list(contestants)
        while going:
            going = [one for one in going if one.go_on(slice_s[id(one)])][::-1]
        for one in contestants:
            one.finish()
    finally:
        for one in contestants:
            one.kill()
