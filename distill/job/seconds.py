"""Where the seconds of a command went, stage by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from distill.job.context import Context
from distill.observability.trace import read


def seconds_of(context: Context, **running: float) -> dict[str, Any]:
    """Return the section `seconds` of metrics.json: those of rank 0's stages, in all attempts as far as they left
    traces, with what stages that still run have taken so far; and of this attempt those before its first stage, and
    since the command began, on all ranks together (device seconds)."""
    stages: dict[str, float] = defaultdict(float)
    for trace in read(context.run.path):
        if trace.rank == 0 and trace.generation != context.control.generation:
            for span in trace.spans:
                if span.kind == "stage":
                    stages[span.name] += span.seconds
    for name, seconds in (*context.trace.stages.items(), *running.items()):
        stages[name] += seconds
    whole = time.time() - context.started_s
    return {
        "stages": dict(stages),
        "start": context.trace.started_s - context.started_s,
        "command": whole,
        "device_seconds": context.world_size * whole,
        "budget": context.config.budget.seconds,
    }
