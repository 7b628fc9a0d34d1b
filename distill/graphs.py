"""CUDA graphs and the streams they run on: work on tensors of a fixed form, captured once and then replayed with a
single launch. Knows nothing of blocks and losses.

Source: PyTorch documentation, "CUDA semantics", section "CUDA Graphs" (whole-network capture).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WARM_UPS = 3  # calls before the capture: what is made once (optimizer state, cuDNN's plans) must not be part of it
NUM_LANES = 4  # streams for the blocks of a rank

Work = Callable[..., Sequence[Tensor]]
Capture = Callable[[Callable[[], Sequence[Tensor]]], "tuple[Callable[[], None], Sequence[Tensor]]"]


class Lane:
    """A stream beside the main one, on which some blocks train; without a stream, the main one itself (any device)."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.stream = stream
        self._main: torch.cuda.Stream | None = None
        # Graphs of one lane never run at the same time and keep nothing, so that they may share their memory.
        self.pool = None if stream is None else torch.cuda.graph_pool_handle()

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

    def let_go(self) -> None:
        """Let the main stream wait for what this lane has been given so far: it may then overwrite what was read."""
        if self.stream is not None and self._main is not None:
            self._main.wait_stream(self.stream)

    def join(self) -> None:
        """Let the current stream wait for this lane."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


def lanes(device: torch.device) -> list[Lane]:
    """Return new lanes on a CUDA device."""
    return [Lane(torch.cuda.Stream(device)) for _ in range(NUM_LANES)]  # type: ignore[no-untyped-call]


class Captured:
    """`work` on tensors. Its first calls for tensors of one form run as they are; then it is captured and replayed.

    It works on copies of its inputs; `copied` is called when the copies have been given to the device. What a call
    returns is the caller's own. Where the capture fails, a warning says so once and the work goes on uncaptured.
    """

    def __init__(self, work: Work, *, name: str, capture: Capture, copied: Callable[[], None] = lambda: None) -> None:
        self._work, self._name, self._capture, self._copied = work, name, capture, copied
        self._inputs: list[Tensor] = []
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._results: Sequence[Tensor] = ()
        self._failed = False

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if [_form(tensor) for tensor in inputs] != [_form(tensor) for tensor in self._inputs]:
            self._inputs = [torch.empty_like(tensor) for tensor in inputs]
            self._calls, self._replay, self._results = 0, None, ()
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self._copied()
        self._calls += 1
        if self._replay is None and self._calls > WARM_UPS and not self._failed:
            self._try_capture()
        if self._replay is None:
            buffers = set(map(id, self._inputs))
            return [result.clone() if id(result) in buffers else result for result in self._work(*self._inputs)]
        self._replay()
        return [result.clone() for result in self._results]

    def _try_capture(self) -> None:
        try:
            self._replay, self._results = self._capture(lambda: self._work(*self._inputs))
        except RuntimeError as error:
            self._failed = True
            reason = str(error).strip().partition("\n")[0]
            what = "%s: not captured as a CUDA graph, runs kernel by kernel: %s"
            log.warning(what, self._name, reason, exc_info=True)  # what came first is in the log file


def cuda_capture(lane: Lane | None = None) -> Capture:
    """Return what captures work as a CUDA graph, on the stream and in the memory of a lane. Graphs that may run at the
    same time need different lanes: cuBLAS has one workspace for everything captured on a stream (pytorch#193402)."""
    side = lane or Lane()

    def capture(work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        collects = gc.isenabled()
        gc.disable()  # it could destroy another graph, which spoils the one that is captured (pytorch#161037)
        try:
            # Threads that send and receive go on using CUDA meanwhile.
            with torch.cuda.graph(graph, pool=side.pool, stream=side.stream, capture_error_mode="thread_local"):
                results = work()
        except RuntimeError:
            torch.cuda.set_stream(current)  # torch leaves the capture's own where its end fails as well
            raise
        finally:
            if collects:
                gc.enable()
        return graph.replay, results

    return capture


def _form(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype
