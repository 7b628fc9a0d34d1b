"""The demo's promise: seconds after installation, and the student's distance from its teacher, over seeds.

    python benchmarks/demo.py SCRATCH [--seeds 3]

Runs what launch/demo.sh runs, into SCRATCH, once a seed. About 1 minute a seed on 2 cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import read, run, summary, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    seconds, metrics = [], []
    for seed in range(args.seeds):
        run_dir = args.scratch.absolute() / f"demo{seed}"
        overrides = ("launch.nproc_per_node=2", "launch.threads_per_rank=1", f"seed={seed}")
        seconds.append(run(*overrides, run_dir=run_dir))
        metrics.append(read(run_dir / "metrics.json"))
    students = [m["student"] for m in metrics]
    teachers = [m["teacher"] for m in metrics]
    write(
        "demo",
        {
            "what": "the demo with two ranks of one thread: all stages, teacher training included",
            "wall_seconds": summary(seconds),
            "teacher_top1": summary([t["top1"] for t in teachers]),
            "student_top1": summary([s["top1"] for s in students]),
            "points_lost": summary([t["top1"] - s["top1"] for s, t in zip(students, teachers, strict=True)]),
            "replaced_params_ratio": students[0]["replaced_params"] / teachers[0]["replaced_params"],
            "goal": "at most 120 s; at most 1.0 point lost; at most a third of the replaced convolutions' parameters",
        },
    )


if __name__ == "__main__":
    main()
