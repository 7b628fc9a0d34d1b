"""What more costs: seconds and bytes of a step against batch size, number of blocks and ranks; start-up, planning and
collection apart.

    python benchmarks/growth.py SCRATCH [--ranks 1 2] [--rounds 2] [--steps 12] [--strategy broadcast]

Real commands with one thread a rank on the embedded images at 32 x 32 pixels; CIFAR ResNets with random weights, which
cost the same, by residual block. All set-ups alternate within every round; medians over rounds. Times are from the
trace of each run:

start-up    from the command to the plan: imports, data, teacher, cutting, ranks that find one another
planning    costs measured on every rank, the plan made and printed
step        from the first teacher pass to the last update of any rank, over the number of steps
collection  from the last update to the end of the stage: the last blocks handed over, written and confirmed
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from measure import random_weights, read, run, summary, write

NETWORKS = {"cifar_resnet20": 9, "cifar_resnet32": 15, "cifar_resnet56": 27}  # name: blocks with a student
BATCH_SIZES = (32, 64, 128)
SMALL_BATCH = BATCH_SIZES[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strategy", default="broadcast")
    args = parser.parse_args()
    base = next(iter(NETWORKS))
    setups = [(base, size, ranks) for size in BATCH_SIZES for ranks in args.ranks]
    setups += [(name, SMALL_BATCH, ranks) for name in NETWORKS if name != base for ranks in args.ranks]
    rounds = [
        {setup: _measure(setup, args, args.scratch.absolute() / f"round{n}") for setup in setups}
        for n in range(args.rounds)
    ]
    rows = [_row(setup, [found[setup] for found in rounds], args.steps) for setup in setups]
    print(_table(rows))
    what = f"{args.strategy}, {args.steps} steps a block, measured costs, one thread a rank"
    write("growth", {"what": what, "setups": rows})


def _measure(setup: tuple[str, int, int], args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run one command and return its times in seconds, and its bytes."""
    name, batch_size, ranks = setup
    run_dir = folder / f"{name}-{batch_size}-{ranks}"
    began = time.time()
    run(
        f"teacher={name}",
        f"teacher.weights={random_weights(name, args.scratch)}",
        "data.image_size=32",
        f"data.batch_size={batch_size}",
        f"distill.steps={args.steps}",
        f"plan.strategy={args.strategy}",
        f"launch.nproc_per_node={ranks}",
        "launch.threads_per_rank=1",
        "stage=distill",
        run_dir=run_dir,
    )
    return _times(read(run_dir / "trace.json"), began) | {
        "bytes": read(run_dir / "stages" / "distill.json")["bytes_sent"]
    }


def _times(trace: dict[str, Any], began: float) -> dict[str, float]:
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    stages = {span["name"]: span for span in spans if span["cat"] == "stage" and span["pid"] % 10_000 == 0}
    updates = [span for span in spans if span["cat"] == "student"]
    plan, stage = stages["stage plan"], stages["stage distill"]
    first = min(span["ts"] for span in spans if span["cat"] in ("teacher", "student"))
    last = max(span["ts"] + span["dur"] for span in updates)
    return {
        "start_up_s": trace["otherData"]["started_s"] - began + plan["ts"] / 1e6,
        "planning_s": plan["dur"] / 1e6,
        "steps_s": (last - first) / 1e6,
        "collection_s": (stage["ts"] + stage["dur"] - last) / 1e6,
    }


def _row(setup: tuple[str, int, int], found: list[dict[str, float]], steps: int) -> dict[str, Any]:
    name, batch_size, ranks = setup
    return {
        "network": name,
        "blocks": NETWORKS[name],
        "batch_size": batch_size,
        "ranks": ranks,
        "seconds_per_step": summary([one["steps_s"] / steps for one in found]),
        "bytes_per_step": summary([one["bytes"] / steps for one in found]),
        **{key: summary([one[key] for one in found]) for key in ("start_up_s", "planning_s", "collection_s")},
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table for docs/results.md."""
    lines = [
        "| blocks | batch | ranks | ms a step | MB a step | start-up s | planning s | collection s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            row["blocks"], row["batch_size"], row["ranks"], f"{1e3 * row['seconds_per_step']['median']:.0f}",
            f"{row['bytes_per_step']['median'] / 1e6:.1f}",
            *(f"{row[key]['median']:.2f}" for key in ("start_up_s", "planning_s", "collection_s")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
