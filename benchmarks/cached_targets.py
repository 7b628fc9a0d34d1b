"""Runs with cached targets against runs without, on the same fixed views: what recording costs and from where it pays.

    python benchmarks/cached_targets.py SCRATCH --data PARQUET_FILE [--epochs 1 4] [--rounds 3] [--held-out SHARE]

ResNet-20 by residual block, two ranks of one thread, one view of every image. All set-ups alternate within every round;
medians over rounds. Any parquet file with CIFAR-10 images will do, and the teacher has random weights: a step costs the
same. The cache's set-ups must give one another's bits, and the same errors as the run without to a thousandth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure import block_bits, random_weights, read, run, summary, write

STAGE = Path("stages") / "distill.json"
NAME = "cifar_resnet20"
SETUPS = {  # name: overrides
    "broadcast": ("plan.strategy=broadcast",),
    "auto": ("plan.strategy=auto",),
    "ram": ("teacher.cache=ram",),
    "disk": ("teacher.cache=disk",),
    "ram_bf16": ("teacher.cache=ram", "cache.dtype=bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--held-out", type=float, default=0.8, help="share of the images left out, to make epochs short"
    )
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    job = _job(args)
    found: dict[str, Any] = {}
    for epochs in args.epochs:
        rounds = []
        for number in range(args.rounds):
            folder = args.scratch.absolute() / f"{epochs:g}" / f"round{number}"
            for name, overrides in SETUPS.items():
                run(*job, *overrides, f"distill.epochs={epochs}", run_dir=folder / name)
            _check(folder)
            rounds.append({name: read(folder / name / STAGE)["result"] for name in SETUPS})
        found[f"{epochs:g} epochs"] = _result(rounds)
    what = f"distill stage and recording, ResNet-20, batch 128, one view, {args.ranks} ranks of one thread"
    write("cached_targets", {"what": what, "held_out": args.held_out, "budgets": found})


def _job(args: argparse.Namespace) -> tuple[str, ...]:
    return (
        f"teacher={NAME}",
        f"teacher.weights={random_weights(NAME, args.scratch)}",
        "data=hf",
        f"data.root={args.data.absolute()}",
        "data.batch_size=128",
        f"data.validation_fraction={args.held_out}",
        "distill.views=1",
        "cache.max_gib=16",
        "stage=distill",
        f"launch.nproc_per_node={args.ranks}",
        "launch.threads_per_rank=1",
    )


def _check(folder: Path) -> None:
    """The cache's place must not change a bit, and the cache hardly an error."""
    assert block_bits(folder / "ram") == block_bits(folder / "disk"), "the place of the cache changed the students"
    assert block_bits(folder / "broadcast") == block_bits(folder / "auto"), "a strategy changed the students"
    with_cache, without = (
        {entry["name"]: entry["rel_error_last"] for entry in map(json.loads, lines)}
        for lines in ((folder / name / "ledger.jsonl").read_text().splitlines() for name in ("ram", "broadcast"))
    )
    for block, error in without.items():
        assert abs(with_cache[block] / error - 1) < 1e-3, f"the cache changed {block}"


def _result(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def whole(stage: dict[str, Any]) -> float:
        """Seconds of the stage with those of recording."""
        return float(stage["seconds"] + stage.get("cache", {}).get("seconds", 0.0))

    def setup(name: str) -> dict[str, Any]:
        stages = [found[name] for found in rounds]
        facts = {
            "seconds": summary([stage["seconds"] for stage in stages]),
            "seconds_with_recording": summary([whole(stage) for stage in stages]),
            "predicted_over_measured": summary([stage["makespan_predicted_s"] / stage["seconds"] for stage in stages]),
            "cpu_seconds": summary([stage["cpu_seconds"] for stage in stages]),
            "mean_idle_share": summary([sum(stage["idle_share"]) / len(stage["idle_share"]) for stage in stages]),
            "teacher_passes": stages[0]["teacher_passes"],
        }
        if "cache" in stages[0]:
            caches = [stage["cache"] for stage in stages]
            facts["recording_s"] = summary([cache["seconds"] for cache in caches])
            facts["recording_predicted_over_measured"] = summary(
                [cache["predicted_s"] / cache["seconds"] for cache in caches]
            )
            facts["gib"] = caches[0]["bytes"] / 2**30
        return facts

    def times_faster(name: str) -> dict[str, Any]:
        return {
            "the stage": summary([found["auto"]["seconds"] / found[name]["seconds"] for found in rounds]),
            "with recording": summary([found["auto"]["seconds"] / whole(found[name]) for found in rounds]),
        }

    return {
        "setups": {name: setup(name) for name in SETUPS},
        "times_faster_than_auto": {name: times_faster(name) for name in ("ram", "disk", "ram_bf16")},
    }


if __name__ == "__main__":
    main()
