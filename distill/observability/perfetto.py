"""The traces of all ranks as one file that ui.perfetto.dev opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.observability.trace import read
from distill.storage.files import write_text


def write_perfetto(run_dir: Path) -> Path:
    """Write trace.json from the ranks' traces, in the Trace Event Format that ui.perfetto.dev and chrome://tracing
    open: one process a rank and attempt, one track a thread, microseconds since the first span.

    Source: "Trace Event Format", Google, sections "Complete Events" and "Metadata Events".
    """
    traces = read(run_dir)
    origin = min((span.start_s for trace in traces for span in trace.spans), default=0.0)
    events: list[dict[str, Any]] = []
    for trace in traces:
        process = trace.generation * 10_000 + trace.rank
        label = f"rank {trace.rank}" if trace.generation <= 1 else f"rank {trace.rank}, attempt {trace.generation}"
        events += [_named("process_name", process, 0, label), _named("process_sort_index", process, 0, process)]
        tracks = {thread: track for track, thread in enumerate(trace.threads)}
        events += [_named("thread_name", process, tracks[thread], name) for thread, name in trace.threads.items()]
        for span in trace.spans:
            events.append(
                {
                    "ph": "X", "cat": span.kind, "name": f"{span.kind} {span.name}".strip(), "pid": process,
                    "tid": tracks[span.thread], "ts": round(1e6 * (span.start_s - origin), 1),
                    "dur": round(1e6 * span.seconds, 1), "args": {} if span.step is None else {"step": span.step},
                }
            )  # fmt: skip
    skipped = {f"rank {trace.rank}": trace.steps_skipped for trace in traces if trace.steps_skipped}
    path = run_dir / "trace.json"
    other = {"started_s": origin, "steps_not_recorded": skipped}
    whole = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}
    write_text(path, json.dumps(whole, allow_nan=False))  # without a checksum: it may be large, and is not read here
    return path


def _named(what: str, process: int, thread: int, value: str | int) -> dict[str, Any]:
    key = "sort_index" if what.endswith("sort_index") else "name"
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {key: value}}
