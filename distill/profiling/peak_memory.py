"""The most memory that this process has had since a moment: on the GPU where it works on one, else of the host."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def used_memory(device: torch.device) -> int:
    """Return the bytes that this process has now: taken from a GPU by PyTorch, else resident (VmRSS), after giving back
    what it has freed."""
    _give_back(device)
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else _status("VmRSS")


class PeakMemory:
    """Counts from its making on; before, freed memory that the process still holds is given back.

    On the CPU it is the kernel's high-water mark of resident memory (VmHWM, which is reset), program and libraries
    included, memory shared with other ranks counted in each of them; on a GPU what PyTorch's allocator has taken from
    it, which is more than it has handed out: captured graphs keep memory that is not in use between two replays.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        _give_back(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):  # else the mark counts from the start of the process
            _CLEAR.write_text("5")

    def read(self) -> int:
        """Return the bytes at most so far."""
        return int(torch.cuda.max_memory_reserved(self._device)) if self._device.type == "cuda" else _status("VmHWM")


def _give_back(device: torch.device) -> None:
    gc.collect()  # trainers refer to themselves, also those that costs were measured with
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])  # Linux counts in KiB
    raise LookupError(field)
