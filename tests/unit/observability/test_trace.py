"""Traces: what is kept, what is summed, and what Perfetto is given."""

import json
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distill.observability.perfetto import write_perfetto
from distill.observability.trace import MAX_SPANS, WHOLE_STEPS, Trace, read


def steps_of(trace: Any, kind: str) -> list[int]:
    return sorted({span.step for span in trace.spans if span.kind == kind})


def record(trace: Trace, *, steps: int, spans_per_step: int) -> None:
    for step in range(steps):
        for block in range(spans_per_step):
            with trace.span("student", f"block {block}", step):
                pass


def test_a_short_run_is_kept_whole(tmp_path: Path) -> None:
    trace = Trace(rank=3, generation=2)
    record(trace, steps=20, spans_per_step=4)
    trace.save(tmp_path / "traces")
    assert [file.name for file in (tmp_path / "traces").iterdir()] == ["rank3.2.json"]
    (kept,) = read(tmp_path)
    assert (kept.rank, kept.generation, kept.steps_skipped) == (3, 2, 0)
    assert len(kept.spans) == 80
    assert steps_of(kept, "student") == list(range(20))


@pytest.mark.parametrize(("steps", "spans_per_step"), [(20_000, 3), (300, 200)])
def test_a_long_run_keeps_its_first_and_last_steps_whole_and_samples_between(
    tmp_path: Path, steps: int, spans_per_step: int
) -> None:
    trace = Trace()
    record(trace, steps=steps, spans_per_step=spans_per_step)
    trace.save(tmp_path / "traces")
    assert (tmp_path / "traces" / "rank0.0.json").stat().st_size < 2_000_000
    (kept,) = read(tmp_path)
    assert len(kept.spans) <= MAX_SPANS * 1.2
    found = steps_of(kept, "student")
    whole = min(WHOLE_STEPS, MAX_SPANS // 4 // spans_per_step)
    assert found[:whole] == list(range(whole))
    assert found[-whole:] == list(range(steps - whole, steps))
    between = found[WHOLE_STEPS:-WHOLE_STEPS]
    assert len({b - a for a, b in pairwise(between)}) <= 2  # one stride, and its meeting the ends
    assert kept.steps_skipped == steps - len(found)
    assert kept.totals["student"]["count"] == steps * spans_per_step


def test_seconds_are_summed_over_what_is_not_kept_too() -> None:
    trace = Trace()
    for step in range(5):
        trace.since(0.0, "wait", "", step)
    assert trace.seconds("wait") > 0
    assert trace.seconds("send") == 0


class FakeDevice:
    """A device that is behind: a mark's time is known when it has come so far."""

    def __init__(self) -> None:
        self.marks, self.done = 0, 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def passed(self, mark: int) -> bool:
        return mark <= self.done

    def seconds(self, mark: int) -> float:
        assert mark <= self.done
        return 100.0 + mark


def test_device_work_is_kept_with_the_times_of_the_device(tmp_path: Path) -> None:
    device = FakeDevice()
    trace = Trace(device_clock=device)
    for step in range(3):
        with trace.span("student", "a", step, on_device=True):
            pass
    device.done = 4
    trace.save(tmp_path / "traces")
    (kept,) = read(tmp_path)
    assert [(span.start_s, span.seconds, span.step) for span in kept.spans] == [(101.0, 1.0, 0), (103.0, 1.0, 1)]
    device.done = 6
    trace.save(tmp_path / "traces")
    assert len(read(tmp_path)[0].spans) == 3


def test_perfetto_is_given_a_process_a_rank_and_a_track_a_thread(tmp_path: Path) -> None:
    for rank in (0, 1):
        trace = Trace(rank=rank, generation=1)
        with trace.span("teacher", "", 7):
            pass
        sender = threading.Thread(target=lambda trace=trace: trace.since(0.0, "send", "to 1", 7), name="send-1")
        sender.start()
        sender.join()
        trace.save(tmp_path / "traces")
    (tmp_path / "traces" / "rank9.1.json").write_text('{"rank": 9, "spa')  # killed while it wrote
    content = json.loads(write_perfetto(tmp_path).read_text())
    events = content["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {10_000, 10_001}
    assert {event["name"] for event in spans} == {"teacher", "send to 1"}
    assert min(event["ts"] for event in spans) == 0
    assert all(event["dur"] >= 0 and event["args"] == {"step": 7} for event in spans)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {names[event["pid"], event["tid"]] for event in spans} == {"MainThread", "send-1"}
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0", "rank 1"}


def test_an_attempt_that_did_nothing_leaves_no_trace(tmp_path: Path) -> None:
    Trace().save(tmp_path / "traces")
    assert not (tmp_path / "traces").exists()


def test_traces_of_long_gone_attempts_are_removed(tmp_path: Path) -> None:
    for generation in range(1, 9):
        trace = Trace(generation=generation)
        record(trace, steps=1, spans_per_step=1)
        trace.save(tmp_path / "traces")
    assert [trace.generation for trace in read(tmp_path)] == [4, 5, 6, 7, 8]
