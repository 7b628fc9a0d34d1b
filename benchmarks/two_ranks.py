"""Two ranks with one thread each against one, on the distill stage, and against what the machine can do at all.

    python benchmarks/two_ranks.py SCRATCH --data PARQUET_FILE --teacher RESNET20_WEIGHTS [--rounds 5] [--steps 60]

The limit is two independent one-rank runs side by side: the same work twice, with nothing to exchange. The three
set-ups alternate within every round; medians over rounds. Any parquet file with CIFAR-10 images will do: the smaller
test file loads faster and costs the same per step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import block_bits, finish, read, run, start, summary, write

STAGE = Path("stages") / "distill.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    job = (
        "teacher=cifar_resnet20",
        f"teacher.weights={args.teacher.absolute()}",
        "data=hf",
        f"data.root={args.data.absolute()}",
        "data.batch_size=128",
        f"distill.steps={args.steps}",
        "stage=distill",
        "launch.threads_per_rank=1",
    )
    rounds = [_round(job, args.scratch.absolute() / f"round{number}") for number in range(args.rounds)]
    write("two_ranks", _result(rounds, args.steps))


def _round(job: tuple[str, ...], folder: Path) -> dict[str, Any]:
    one, two, left, right = (folder / name for name in ("one", "two", "left", "right"))
    run(*job, run_dir=one)
    run(*job, "launch.nproc_per_node=2", run_dir=two)
    pair = [(start(*job, run_dir=side), side) for side in (left, right)]
    for process, side in pair:
        finish(process, side)
    assert block_bits(one) == block_bits(two) == block_bits(left), "the layout changed the students"
    found = {side.name: read(side / STAGE) for side in (one, two, left, right)}
    seconds = {name: stage["seconds"] for name, stage in found.items()}
    rate_of_limit = 1 / seconds["left"] + 1 / seconds["right"]
    return {
        "seconds": seconds,
        "cpu_seconds": {name: stage["cpu_seconds"] for name, stage in found.items()},
        "two": found["two"],
        "of_the_limit": (1 / seconds["two"]) / rate_of_limit,
        "speedup": seconds["one"] / seconds["two"],
    }


def _result(rounds: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    def over(*keys: Any) -> dict[str, Any]:
        values = []
        for found in rounds:
            value: Any = found
            for key in keys:
                value = value[key]
            values.append(value)
        return summary(values)

    return {
        "what": f"distill stage, ResNet-20, residual blocks, batch 128, {steps} steps, measured costs, same bits",
        "seconds_one_rank": over("seconds", "one"),
        "seconds_two_ranks": over("seconds", "two"),
        "seconds_side_by_side": summary([max(r["seconds"]["left"], r["seconds"]["right"]) for r in rounds]),
        "speedup": over("speedup"),
        "of_the_limit": over("of_the_limit"),
        "cpu_seconds_one_rank": over("cpu_seconds", "one"),
        "cpu_seconds_two_ranks": over("cpu_seconds", "two"),
        "cpu_seconds_side_by_side": summary(
            [(r["cpu_seconds"]["left"] + r["cpu_seconds"]["right"]) / 2 for r in rounds]
        ),
        "predicted_s_two_ranks": over("two", "makespan_predicted_s"),
        "idle_share_rank0": over("two", "idle_share", 0),
        "idle_share_rank1": over("two", "idle_share", 1),
        "bytes_sent_per_step": rounds[0]["two"]["bytes_sent"] / steps,
        "teacher_passes": over("two", "teacher_passes"),
        "goal": "of_the_limit at least 0.90",
    }


if __name__ == "__main__":
    main()
