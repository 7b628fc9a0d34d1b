"""The real experiment: ResNet-20 on CIFAR-10 by experiment=cifar10_resnet20, over seeds.

    python benchmarks/cifar10_resnet20.py SCRATCH --data CIFAR10_FOLDER --teacher RESNET20_WEIGHTS [--seeds 1]

CIFAR10_FOLDER holds train.parquet and test.parquet. About a quarter of an hour a seed on 2 cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import read, run, summary, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    seconds, metrics = [], []
    for seed in range(args.seeds):
        run_dir = args.scratch.absolute() / f"cifar10_resnet20-{seed}"
        overrides = (
            "experiment=cifar10_resnet20",
            f"data.root={args.data.absolute()}",
            f"teacher.weights={args.teacher.absolute()}",
            "launch.nproc_per_node=2",
            "launch.threads_per_rank=1",
            f"seed={seed}",
        )
        seconds.append(run(*overrides, run_dir=run_dir))
        metrics.append(read(run_dir / "metrics.json"))
    students = [m["student"] for m in metrics]
    teacher = metrics[0]["teacher"]
    write(
        "cifar10_resnet20",
        {
            "what": "experiment=cifar10_resnet20 with two ranks of one thread, whole command",
            "seeds": list(range(args.seeds)),
            "wall_seconds": summary(seconds),
            "distill_seconds": summary([m["distill"]["seconds"] for m in metrics]),
            "makespan_predicted_s": summary([m["distill"]["makespan_predicted_s"] for m in metrics]),
            "finetune_seconds": summary([m["finetune"]["seconds"] for m in metrics]),
            "teacher_top1": teacher["top1"],
            "student_top1_assembled": summary([s["top1_assembled"] for s in students]),
            "student_top1_recalibrated": summary([s["top1_recalibrated"] for s in students]),
            "student_top1": summary([s["top1"] for s in students]),
            "params_ratio": students[0]["params"] / teacher["params"],
            "flops_ratio": students[0]["flops"] / teacher["flops"],
            "latency_ms_batch64": {
                "teacher": teacher["latency_ms_batch64"],
                "student": students[0]["latency_ms_batch64"],
            },
            "goal": "at most 1200 s; at most 0.30 of the parameters; at most 2.5 points lost",
        },
    )


if __name__ == "__main__":
    main()
