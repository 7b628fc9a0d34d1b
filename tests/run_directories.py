"""Run directories made up of numbers, for the tests of what is drawn from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.observability.trace import RankTrace, TimeSpan
from distill.storage.files import json_line, write_json

EVIL = "<script>alert('x')</script> & \"co\""
START_S = 1_700_000_000.0
STEP_S = 0.01


def network(**changes: Any) -> dict[str, Any]:
    return {
        "name": "resnet", "top1": 90.0, "top5": 99.0, "params": 1000, "replaced_params": 800, "bytes": 4000,
        "flops": 2_000_000, "latency_ms_batch1": 2.0, "latency_ms_batch64": 30.0,
    } | changes  # fmt: skip


def block(index: int, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "unit": index, "block": index, "name": name, "rank": index % 2, "steps": 200, "status": "finished",
        "rel_error_first": 0.9,
        "rel_error_last": 0.1234, "seconds": 3.5, "finished_at_s": 9.0, "sha256": "ab" * 32, "generation": 1,
    } | changes  # fmt: skip


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "teacher": network(),
        "student": network(top1=88.5, top1_assembled=40.0, top1_recalibrated=85.0, params=250, flops=500_000),
        "data": {"name": "digits"},
        "blocks": [block(0, "layer1.0"), block(1, "layer2.0"), block(2, EVIL, status="diverged")],
        "distill": {
            "strategy": "broadcast", "world_size": 2, "seconds": 12.34, "makespan_predicted_s": 11.0,
            "images_per_second": 1234.0, "idle_share": [0.05, 0.25], "cpu_seconds": 20.0, "bytes_sent": 3_000_000,
        },
        "environment": {"device": EVIL},
        "seed": 7,
        "fingerprint": "0123456789abcdef",
    } | changes  # fmt: skip


def energy() -> dict[str, Any]:
    """A host with two GPUs, one of them idle, and a processor that could not be read."""
    one = {"host": "node", "kind": "gpu", "name": "Board", "uuid": "u"}
    stage = {"seconds": 10.0, "joules": 1500.0, "gpu_joules": 1500.0, "cpu_joules": None, "idle_devices_joules": 300.0}
    return {
        "devices": [
            one | {"index": 0, "ranks": [0], "joules": {"distill": 1500.0}},
            one | {"index": 1, "ranks": [], "joules": {"distill": 300.0}},
        ],
        "stages": {"distill": stage | {"ranks": {"0": 1500.0, "1": None}}},
        "not_measured": ["cpu on node: no RAPL counter is readable"],
        "notes": ["a reading was lost"],
        "images": 15_000,
    }


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a .jsonl file as the package does."""
    with path.open("a") as file:
        file.writelines(json_line(line, path.name) for line in lines)


def run_directory(folder: Path, content: dict[str, Any] | None, *, readings: int = 5) -> Path:
    """A run with these metrics (None: it has none yet) and this many readings of every block."""
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    (folder / "resolved.yaml").write_text("stage: all\nlaunch:\n  nproc_per_node: 2\nrun:\n  dir: null\n")
    if content is not None:
        write_json(folder / "metrics.json", content)
    blocks = (content or metrics()).get("blocks", [])
    for rank in {one["rank"] for one in blocks}:
        lines = [
            {"unit": one["unit"], "step": 20 * step, "relative_error": 0.9 / step, "seconds": 0.1 * step}
            for one in blocks
            if one["rank"] == rank
            for step in range(1, readings + 1)
        ]
        write_lines(folder / "metrics" / f"rank{rank}.jsonl", lines)
    return folder


def planned(folder: Path, *, blocks: int, ranks: int, budget: int = 200) -> Path:
    """Add a plan of blocks 0 to `blocks` - 1, dealt to the ranks in turn, and its costs."""
    owners = [[b for b in range(blocks) if b % ranks == rank] for rank in range(ranks)]
    plan = {
        "strategy": "broadcast", "owners": owners, "predicted_makespan_s": 5.0, "predicted_rank_s": [5.0] * ranks,
        "spans": [{"unit": b, "first": 0, "budget": budget, "input": b, "target": b + 1} for b in range(blocks)],
    }  # fmt: skip
    seconds = {"teacher": [0.001] * blocks, "student": [0.004] * blocks}
    flops = {"teacher": [3e6] * blocks, "student": [5e6] * blocks}
    names = [f"layer{b}.0" for b in range(blocks)]
    write_json(folder / "plan.json", plan)
    write_json(folder / "costs.json", {"blocks": names, "seconds": seconds, "flops": flops})
    return folder


def traced(
    folder: Path, *, ranks: int, steps: int, per_step: int = 3, kept_every: int = 1, generation: int = 1
) -> Path:
    """Add the traces of a distill stage: a step takes STEP_S, of which the last tenth is spent waiting."""
    (folder / "traces").mkdir(exist_ok=True)
    for rank in range(ranks):
        spans = [TimeSpan(START_S, steps * STEP_S + 0.05, "stage", "distill", 0)]
        kept = [s for s in range(steps) if s % kept_every == 0 or s < 8 or s >= steps - 8]
        for step in kept:
            begin, each = START_S + step * STEP_S, 0.9 * STEP_S / per_step
            for part in range(per_step):
                kind = "teacher" if rank == 0 and part == 0 else "student"
                spans.append(TimeSpan(begin + part * each, each, kind, f"layer{part}.0", 0, step))
            spans.append(TimeSpan(begin + 0.9 * STEP_S, 0.1 * STEP_S, "wait", "for a batch", 0, step))
            spans.append(TimeSpan(begin, 0.3 * STEP_S, "receive" if rank else "send", "rank", 1, step))
        spans.append(TimeSpan(START_S + steps * STEP_S, 0.01, "ledger", "record layer0.0", 2))
        work = 0.9 * steps * STEP_S
        totals = {"student": {"seconds": work, "count": steps}, "wait": {"seconds": work / 9, "count": steps}}
        trace = RankTrace(rank, generation, START_S, {0: "MainThread", 1: "edge", 2: "ledger"}, spans, totals,
                          steps - len(kept))  # fmt: skip
        write_json(folder / "traces" / f"rank{rank}.{generation}.json", asdict(trace))
    return folder


def huge(folder: Path) -> Path:
    """A finished run of 200 blocks on 64 ranks with 200 readings a block and a full trace of every rank."""
    blocks = [block(b, f"stage{b // 10}.unit{b % 10}.convolution", rank=b % 64) for b in range(200)]
    ranks = {"world_size": 64, "idle_share": [0.1] * 64}
    run_directory(folder, metrics(blocks=blocks, distill=metrics()["distill"] | ranks, energy=energy()), readings=0)
    for rank in range(64):
        lines = [
            {"unit": one["unit"], "step": s, "relative_error": 0.5 / s + 0.01 * math.sin(s) ** 2 + 0.001}
            for one in blocks
            if one["rank"] == rank
            for s in range(1, 201)
        ]
        write_lines(folder / "metrics" / f"rank{rank}.jsonl", lines)
    planned(folder, blocks=200, ranks=64)
    return traced(folder, ranks=64, steps=3000, per_step=4, kept_every=8)
