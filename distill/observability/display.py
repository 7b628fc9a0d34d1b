"""What the user sees while units train: one line a unit by rich on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

REFRESH_S = 0.5
PLAIN_EVERY_S = 15.0


@dataclass
class UnitLine:
    """One line of the display. `relative_error` has no unit."""

    unit: int
    name: str
    rank: int
    budget: int
    step: int = 0
    loss: float = float("nan")
    relative_error: float = float("nan")
    status: str = "training"


class Display:
    """Redraws the units' lines in a thread. `poll` returns the latest reading of each unit by its index."""

    def __init__(
        self,
        lines: Sequence[UnitLine],
        *,
        batch_size: int,
        poll: Callable[[], Mapping[int, Mapping[str, float]]],
        console: Console,
    ) -> None:
        self._lines = {line.unit: line for line in lines}
        self._batch_size = batch_size
        self._poll = poll
        self._console = console
        self._first_steps: dict[int, int] = {}
        self._started = time.monotonic()
        self._printed = self._started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def move(self, unit: int, rank: int, *, step: int) -> None:
        """Show a unit on the rank that takes it over and say so in a log line."""
        line = self._lines[unit]
        log.info("block %s goes from rank %d to rank %d at step %d", line.name, line.rank, rank, step)
        line.rank = rank

    def finish(self, unit: int, *, status: str, step: int, rank: int, relative_error: float) -> None:
        """Show a unit as finished and say so in a log line."""
        line = self._lines[unit]
        line.step, line.status, line.rank, line.relative_error = step, status, rank, relative_error
        log.info("block %s %s on rank %d: %d steps, relative error %.4f", line.name, status, rank, step, relative_error)

    def _run(self) -> None:
        if self._console.is_terminal:
            with Live(console=self._console, refresh_per_second=4, transient=True) as live:
                while not self._stop.wait(REFRESH_S):
                    self._update()
                    live.update(Group(self._table(), Text(self._summary())))
            return
        while not self._stop.wait(REFRESH_S):
            self._update()
            if time.monotonic() - self._printed >= PLAIN_EVERY_S:
                self._printed = time.monotonic()
                log.info("%s", self._summary())

    def _update(self) -> None:
        for unit, reading in self._poll().items():
            line = self._lines[unit]
            if line.status == "training":
                line.step, line.loss = int(reading["step"]), reading["loss"]
                line.relative_error = reading["relative_error"]
                self._first_steps.setdefault(unit, line.step)

    def _summary(self) -> str:
        elapsed = time.monotonic() - self._started
        training = [line for line in self._lines.values() if line.status == "training"]
        slowest = min((line.step for line in training), default=0)
        done = sum(line.step - self._first_steps.get(line.unit, 0) for line in self._lines.values())
        total = sum(line.budget - line.step for line in training)
        left = f"{total * elapsed / done:.0f} s left" if done else "time left unknown"
        newest = max((line.step - self._first_steps.get(line.unit, 0) for line in self._lines.values()), default=0)
        rate = newest * self._batch_size / max(elapsed, 1e-9)
        finished = len(self._lines) - len(training)
        return (
            f"{finished} of {len(self._lines)} blocks finished, slowest at step {slowest}, {rate:.0f} images/s, {left}"
        )

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("block", "rank", "step", "", "loss", "relative error", ""):
            table.add_column(heading, justify="left" if heading in ("block", "") else "right")
        for line in self._lines.values():
            bar = ProgressBar(total=line.budget, completed=line.step, width=24)
            table.add_row(
                line.name, str(line.rank), f"{line.step}/{line.budget}", bar,
                f"{line.loss:.4f}", f"{line.relative_error:.4f}", "" if line.status == "training" else line.status,
            )  # fmt: skip
        return table
