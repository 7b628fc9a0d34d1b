"""The clock of a CUDA device, for traces: when the work between two marks really ran, not when it was launched."""

from __future__ import annotations

import time

import torch


class DeviceClock:
    """Marks are events on the current stream. Each time one is read it becomes the origin for those after it: event
    times are single-precision milliseconds, which would lose a quarter of a millisecond within an hour."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin = self.mark()
        self._origin.synchronize()
        # Only after the wait do both clocks show the same moment: the device may be far behind the host.
        self._origin_s = time.time()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def seconds(self, mark: torch.cuda.Event) -> float:
        """Return the second of the epoch in which the device came to `mark`, which it has passed."""
        self._origin_s += self._origin.elapsed_time(mark) / 1000
        self._origin = mark
        return self._origin_s
