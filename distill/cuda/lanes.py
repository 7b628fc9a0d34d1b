"""Streams of a CUDA device that are nobody else's, and the lanes on which blocks train beside one another.

PyTorch hands out 32 streams of a device in turn, the first again after the last. A stream that two users share without
knowing it makes them wait for one another, and what one of them is given lands in what the other captures.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NUM_LANES = 4  # streams for the blocks of a rank
_POOL = 32  # PyTorch's streams of one priority

_in_use: set[tuple[int, int]] = set()  # by device and number; the pool is this process's too


def own_stream(device: torch.device, owner: object) -> torch.cuda.Stream:
    """Return a stream that nobody else has from here as long as `owner` lives. NCCL's groups take theirs from the pool
    of high priority (transport.py). Raises RuntimeError when all are taken.

    The owner and not the stream is watched: weak references to streams crash torch 2.11 when they outlive them.
    """
    for _ in range(_POOL):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        key = (stream.device.index, stream.cuda_stream)
        if key not in _in_use:
            _in_use.add(key)
            weakref.finalize(owner, _in_use.discard, key)
            return stream
    raise RuntimeError(f"all {_POOL} streams of {device} are taken")


class Lane:
    """A stream beside the main one of a CUDA device, on which some blocks train; without a device, the main stream
    itself, wherever that is."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.stream = None if device is None else own_stream(device, self)
        self._main: torch.cuda.Stream | None = None
        # Graphs of one lane never run at the same time and keep nothing, so that they may share their memory.
        self.pool = None if device is None else torch.cuda.graph_pool_handle()

    @property
    def captures(self) -> bool:
        """Whether work on this lane may be captured."""
        return self.stream is not None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run what is inside on this lane, after what the main stream has been given."""
        if self.stream is None:
            yield
            return
        self._main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(self._main)
        with torch.cuda.stream(self.stream):
            yield

    @contextmanager
    def left(self, after: torch.cuda.Event | None) -> Iterator[None]:
        """Within entered(), run what is inside on the main stream, `after` a mark of the lane, which waits for it."""
        if self.stream is None or self._main is None:
            yield
            return
        if after is not None:
            self._main.wait_event(after)
        with torch.cuda.stream(self._main):
            yield
        self.stream.wait_stream(self._main)

    def mark(self) -> torch.cuda.Event | None:
        """Return what tells when the lane has done what it was given so far; None without a stream."""
        return None if self.stream is None else self.stream.record_event()

    def let_go(self) -> None:
        """Let the main stream wait for what this lane has been given so far: it may then overwrite what was read."""
        if self.stream is not None and self._main is not None:
            self._main.wait_stream(self.stream)

    def join(self) -> None:
        """Let the current stream wait for this lane."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


def lanes(device: torch.device) -> list[Lane]:
    """Return the lanes of a rank on a CUDA device: to be made once, as there are not many streams."""
    return [Lane(device) for _ in range(NUM_LANES)]
