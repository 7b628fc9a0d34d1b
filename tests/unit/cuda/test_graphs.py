"""Captured work on the CPU, with a recorder in the place of CUDA's: when it captures, what it replays on, what it
returns, and what happens when a capture fails. tests/gpu/test_graphs.py has the real one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.cut import Granularity, cut
from distill.cuda import lanes
from distill.cuda.graphs import WARM_UPS, Captured, cuda_capture
from distill.cuda.lanes import Lane
from distill.distributed.edges.wire import Wire
from distill.training.graphed_teacher import MAX_GRAPHS, GraphedChain

GPU = torch.device("cuda", 0)


class Recorder:
    """Captures as CUDA does: the results' memory stays the same, a replay fills it again."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        self.captures += 1
        results = [torch.full_like(result, torch.nan) for result in work()]

        def replay() -> None:
            self.replays += 1
            for result, found in zip(results, work(), strict=True):
                result.copy_(found)

        return replay, results


def images(step: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def test_is_captured_once_after_the_warm_up_and_then_replayed() -> None:
    recorder, calls = Recorder(), 6
    captured = Captured(lambda x: [x * 2, x.sum()], name="work", capture=recorder)
    found = [captured(images(step)) for step in range(calls)]
    assert (recorder.captures, recorder.replays) == (1, calls - WARM_UPS)
    for step, (double, total) in enumerate(found):  # compared at the end: no later call may have changed them
        assert torch.equal(double, images(step) * 2)
        assert torch.equal(total, images(step).sum())


def test_what_it_returns_is_not_its_own_buffer() -> None:
    captured = Captured(lambda x: [x], name="work", capture=Recorder())
    found = [captured(images(step))[0] for step in range(WARM_UPS + 3)]
    assert all(torch.equal(one, images(step)) for step, one in enumerate(found))


def test_inputs_may_be_overwritten_once_they_are_copied() -> None:
    source = images(0)

    class MainStreamGoesOn(Lane):
        @contextmanager
        def left(self, after: object) -> Iterator[None]:
            yield
            source.zero_()

    captured = Captured(lambda x: [x + 1], name="work", capture=Recorder(), lane=MainStreamGoesOn())
    for step in range(WARM_UPS + 2):
        source.copy_(images(step))
        assert torch.equal(captured(source)[0], images(step) + 1)


class TestStreams:
    """With a pool of three streams, handed out in turn, in the place of CUDA's."""

    class Stream:
        def __init__(self, number: int) -> None:
            self.cuda_stream, self.device = number, SimpleNamespace(index=0)

    @pytest.fixture(autouse=True)
    def pool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        numbers = cycle(range(3))
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.Stream(next(numbers)))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(lanes, "_in_use", set())

    def test_no_stream_is_handed_out_twice(self) -> None:
        kept = [Lane(GPU) for _ in range(3)]
        assert {lane.stream.cuda_stream for lane in kept if lane.stream} == {0, 1, 2}
        with pytest.raises(RuntimeError, match="streams of cuda:0 are taken"):
            Wire(device=GPU, backend="gloo")

    def test_one_that_was_given_up_is_free_again(self) -> None:
        kept = [Lane(GPU) for _ in range(3)]
        del kept[1]
        gc.collect()
        stream = Wire(device=GPU, backend="gloo").stream
        assert stream is not None
        assert stream.cuda_stream == 1


def test_another_form_is_captured_anew() -> None:
    recorder = Recorder()
    captured = Captured(lambda x: [x.mean(dim=0)], name="work", capture=recorder)
    for batch in (2, 3):
        for step in range(WARM_UPS + 2):
            assert torch.equal(captured(images(step, batch))[0], images(step, batch).mean(dim=0))
    assert recorder.captures == 2


def test_a_failing_capture_is_told_once_and_the_work_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: object) -> tuple[Callable[[], None], Sequence[Tensor]]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    captured = Captured(lambda x: [x + 1], name="block layer1.0", capture=fails)
    for step in range(WARM_UPS + 4):
        assert torch.equal(captured(images(step))[0], images(step) + 1)
    assert [record.getMessage() for record in caplog.records] == [
        "block layer1.0: not captured as a CUDA graph, runs kernel by kernel: "
        "operation not permitted when stream is capturing"
    ]


def test_without_a_stream_a_lane_changes_nothing() -> None:
    lane = Lane()
    with lane.entered():
        lane.let_go()
    lane.join()
    assert not lane.captures


class TestCudaCapture:
    """With stand-ins for CUDA that say what they are asked for."""

    STREAM, POOL = "the lane's stream", (0, 7)

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        @contextmanager
        def graph(_: object, **how: Any) -> Iterator[None]:
            asked.update(how)
            yield

        for name, stand_in in {
            "graph": graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=None),
            "current_stream": lambda: "the main stream",
            "set_stream": lambda stream: asked.update(restored=stream),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        return asked

    def test_a_lane_captures_on_its_own_stream_and_in_its_own_memory(self, asked: dict[str, Any]) -> None:
        lane: Any = Lane()
        lane.stream, lane.pool = self.STREAM, self.POOL
        cuda_capture(lane)(list)
        assert asked == {"stream": self.STREAM, "pool": self.POOL, "capture_error_mode": "thread_local"}

    def test_nothing_is_collected_meanwhile(self, asked: dict[str, Any]) -> None:
        seen: list[bool] = []

        def work() -> list[Tensor]:
            seen.append(gc.isenabled())
            return []

        cuda_capture(Lane())(work)
        assert seen == [False]
        assert gc.isenabled()

    def test_a_failure_leaves_the_stream_and_the_collector_as_they_were(self, asked: dict[str, Any]) -> None:
        def fails() -> list[Tensor]:
            raise RuntimeError("operation not permitted")

        with pytest.raises(RuntimeError, match="not permitted"):
            cuda_capture(Lane())(fails)
        assert asked["restored"] == "the main stream"
        assert gc.isenabled()


class TestGraphedChain:
    def chains(self) -> tuple[GraphedChain, GraphedChain, Recorder]:
        torch.manual_seed(0)
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True))]
        chain = cut(nn.Sequential(*layers), images(0), granularity=Granularity.conv)
        recorder = Recorder()
        return chain, GraphedChain(chain, recorder), recorder  # type: ignore[return-value]

    def test_gives_what_the_chain_gives(self) -> None:
        chain, graphed, recorder = self.chains()
        found = [graphed.run(images(step), last=3, keep=(0, 1, 3)) for step in range(WARM_UPS + 3)]
        for step, boundaries in enumerate(found):
            expected = chain.run(images(step), last=3, keep=(0, 1, 3))
            assert boundaries.keys() == expected.keys()
            assert all(torch.equal(boundaries[k], expected[k]) for k in expected)
        assert recorder.replays == 3

    def test_keeps_few_graphs(self) -> None:
        chain, graphed, recorder = self.chains()
        wanted = [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3)]
        for keep in wanted:
            for step in range(WARM_UPS + 1):
                found = graphed.run(images(step), last=max(keep), keep=keep)
                expected = chain.run(images(step), last=max(keep), keep=keep)
                assert all(torch.equal(found[k], expected[k]) for k in keep)
        assert recorder.captures == len(wanted)
        assert len(graphed._graphs) == MAX_GRAPHS
