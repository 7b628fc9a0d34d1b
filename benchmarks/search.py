"""Students whose recipes are chosen under budgets, without a gradient step.

    python benchmarks/search.py SCRATCH --data CIFAR10_FOLDER --teachers FOLDER [--budgets 0.28 0.52] [--seeds 3]

CIFAR10_FOLDER holds train.parquet and test.parquet; FOLDER, resnet20-12fca82f.th. A budget is the whole command, one
rank of one thread, over seeds; CPU seconds are those of all of its processes. Test images are seen once a run.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import MACHINE, read, run, summary, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", default=["0.28", "0.52"], help="shares of the parameters")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = {}
    for budget in args.budgets:
        found = [_measured(args, budget, seed) for seed in range(args.seeds)]
        rows[budget] = {key: summary([one[key] for one in found]) for key in found[0]}
    what = "students chosen under a budget of parameters, no gradient step, CIFAR-10 test top-1 of ResNet-20"
    write("search", {"what": what, "commit": MACHINE["commit"], "seeds": list(range(args.seeds)), "rows": rows})


def _measured(args: argparse.Namespace, budget: str, seed: int) -> dict[str, float]:
    run_dir = args.scratch.absolute() / f"{budget}-{seed}"
    before = _children_s()
    run(
        "teacher=cifar_resnet20",
        f"teacher.weights={args.teachers.absolute() / 'resnet20-12fca82f.th'}",
        "data=hf",
        f"data.root={args.data.absolute()}",
        "launch.nproc_per_node=1",
        "launch.threads_per_rank=1",
        f"search.budget.params={budget}",
        "distill.steps=0",
        "finetune.epochs=0",
        "plan.cost=flops",
        f"seed={seed}",
        run_dir=run_dir,
        OMP_NUM_THREADS="1",
    )
    return {"command_cpu_seconds": _children_s() - before, **_figures(read(run_dir / "metrics.json"))}


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    student, teacher, search = metrics["student"], metrics["teacher"], metrics["search"]
    scored, seconds = len(search["candidates"]), search["scoring"]["cpu_seconds"]
    return {
        "params_ratio": student["params"] / teacher["params"],
        "flops_ratio": student["flops"] / teacher["flops"],
        "top1": student["top1"],
        "candidates": scored,
        "candidates_per_cpu_second": scored / seconds,
    }


def _children_s() -> float:
    """CPU seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
