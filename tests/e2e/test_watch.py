"""What a run leaves for Perfetto and TensorBoard."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.observability.trace import KINDS, read
from tests.documents import fenced
from tests.e2e.command import LIMIT_S, metrics

STEPS = 4  # of every block, in the small job


def curves(run_dir: Path, rank: int) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard" / f"rank{rank}"))
    found.Reload()
    return found


def test_the_trace_says_what_every_rank_did_when(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    traces = {trace.rank: trace for trace in read(run_dir)}
    assert set(traces) == {0, 1}
    owners = {block["name"]: block["rank"] for block in metrics(run_dir)["blocks"]}
    for rank, trace in traces.items():
        assert {span.kind for span in trace.spans} <= set(KINDS)
        trained = Counter(span.name for span in trace.spans if span.kind == "student")
        assert trained == {name: STEPS for name, owner in owners.items() if owner == rank}
        (stage,) = [span for span in trace.spans if (span.kind, span.name) == ("stage", "distill")]
        inside = [span for span in trace.spans if span.kind in ("student", "teacher", "send", "receive", "wait")]
        assert all(stage.start_s <= span.start_s <= stage.start_s + stage.seconds for span in inside)
    assert {span.step for span in traces[0].spans if span.kind == "teacher"} == set(range(STEPS))
    assert {span.step for span in traces[0].spans if span.kind == "send"} == set(range(STEPS))
    assert {span.step for span in traces[1].spans if span.kind == "receive"} == set(range(STEPS))
    assert sum(span.kind == "ledger" for span in traces[0].spans) == len(owners)


def test_the_stages_of_a_run_are_in_the_trace(finished: tuple[Path, str]) -> None:
    events = json.loads((finished[0] / "trace.json").read_text())["traceEvents"]
    stages = [event["name"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event.get("cat") == "stage"]
    leading = [
        f"stage {name}"
        for name in (
            "teacher",
            "first_weights",
            "plan",
            "distill",
            "assemble",
            "refine",
            "finetune",
            "evaluate",
            "deliver",
        )
    ]
    assert list(dict.fromkeys(stages)) == leading


def test_tensorboard_has_the_curves_of_every_block_and_rank(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    for rank in (0, 1):
        found = curves(run_dir, rank)
        own = [block["name"] for block in metrics(run_dir)["blocks"] if block["rank"] == rank]
        tags = found.Tags()["scalars"]
        assert {tag for tag in tags if tag.startswith("relative_error/")} == {f"relative_error/{name}" for name in own}
        for name in own:
            assert [point.step for point in found.Scalars(f"loss/{name}")] == [1, STEPS]
        assert found.Scalars("rank/student_share")[-1].value > 0
        assert found.Scalars("rank/peak_memory_gib")[-1].value > 0.1
    assert {"epochs/teacher_loss", "epochs/finetune_loss"} <= set(curves(run_dir, 0).Tags()["scalars"])


def test_the_documented_tensorboard_command_finds_the_curves(finished: tuple[Path, str]) -> None:
    (command,) = fenced("docs/watch.md", "sh")
    program, *arguments = command.split()
    assert program == "tensorboard"
    outputs = finished[0].parents[1]
    assert outputs.name == "outputs"
    # --inspect reads what the server would show, and ends
    shown = subprocess.run(
        [sys.executable, "-m", "tensorboard.main", *arguments, "--inspect"],
        cwd=outputs.parent, capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    assert "relative_error/layer1.0" in shown.stdout
