"""How long the device works on something."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Stopwatch:
    """Sums the time spent inside `running()`: wall clock on the CPU, stream time by events on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        pair = (_timing_event(), _timing_event())
        pair[0].record()
        yield
        pair[1].record()
        self._pairs.append(pair)

    def read(self) -> float:
        """Return the seconds so far; on CUDA this waits for the device, so call it at log intervals only."""
        for start, end in self._pairs:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._pairs.clear()
        return self._seconds
