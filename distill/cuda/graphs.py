"""CUDA graphs: work on tensors of a fixed form, captured once and then replayed with a single launch. Knows nothing of
blocks and losses.

Source: PyTorch documentation, "CUDA semantics", section "CUDA Graphs" (whole-network capture).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.cuda.lanes import Lane

log = logging.getLogger(__name__)

WARM_UPS = 3  # calls before the capture: what is made once (optimizer state, cuDNN's plans) must not be part of it

Work = Callable[..., Sequence[Tensor]]
Capture = Callable[[Callable[[], Sequence[Tensor]]], "tuple[Callable[[], None], Sequence[Tensor]]"]


class Captured:
    """`work` on tensors. Its first calls for tensors of one form run as they are; then it is captured and replayed.

    Call it on its lane. It works on copies of its inputs, which the main stream makes: it may overwrite the inputs
    next and never waits for other work of the lane. What a call returns is the caller's own. Where the capture fails, a
    warning says so once and the work goes on uncaptured.
    """

    def __init__(self, work: Work, *, name: str, capture: Capture, lane: Lane | None = None) -> None:
        self._work, self._name, self._capture, self._lane = work, name, capture, lane or Lane()
        self._inputs: list[Tensor] = []
        self._read: torch.cuda.Event | None = None  # when the copies have been read
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._results: Sequence[Tensor] = ()
        self._failed = False

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if [_form(tensor) for tensor in inputs] != [_form(tensor) for tensor in self._inputs]:
            self._inputs = [torch.empty_like(tensor) for tensor in inputs]
            self._calls, self._replay, self._results = 0, None, ()
        with self._lane.left(after=self._read):
            for buffer, tensor in zip(self._inputs, inputs, strict=True):
                buffer.copy_(tensor)
        found = self._run()
        self._read = self._lane.mark()
        return found

    def _run(self) -> list[Tensor]:
        self._calls += 1
        if self._replay is None and self._calls > WARM_UPS and not self._failed:
            self._try_capture()
        if self._replay is None:
            # Work that does nothing returns its own input: the buffer, which the next call overwrites.
            buffers = set(map(id, self._inputs))
            return [result.clone() if id(result) in buffers else result for result in self._work(*self._inputs)]
        self._replay()
        # What a graph has found lies where the next replay writes, of this graph or of another one of the lane.
        return [result.clone() for result in self._results]

    def _try_capture(self) -> None:
        try:
            self._replay, self._results = self._capture(lambda: self._work(*self._inputs))
        except RuntimeError as error:
            self._failed = True
            reason = str(error).strip().partition("\n")[0]
            what = "%s: not captured as a CUDA graph, runs kernel by kernel: %s"
            log.warning(what, self._name, reason, exc_info=True)  # what came first is in the log file


def cuda_capture(lane: Lane) -> Capture:
    """Return what captures work as a CUDA graph, on the stream and in the memory of a lane. Graphs that may run at the
    same time need different lanes: cuBLAS has one workspace for everything captured on a stream (pytorch#193402)."""

    def capture(work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        collects = gc.isenabled()
        gc.disable()  # it could destroy another graph, which spoils the one that is captured (pytorch#161037)
        try:
            # Threads that send and receive go on using CUDA meanwhile.
            with torch.cuda.graph(graph, pool=lane.pool, stream=lane.stream, capture_error_mode="thread_local"):
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
