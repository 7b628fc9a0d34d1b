"""Two ranks, one of them slowed to half speed: a plan with measured costs, and one with FLOPs, beside the optimum.

    python benchmarks/uneven_ranks.py SCRATCH --data PARQUET_FILE [--network cifar_resnet20] [--rounds 3] [--steps 30]

Each rank is held on a core of its own, and on rank 1's core runs a process that does nothing but compute, so that each
of the two gets half of it. The set-ups alternate. The optimum is the best of all placements, one by one, with the costs
that a run has measured, rank 0 at full and rank 1 at half speed. Needs two cores that are otherwise idle.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, process_tree, random_weights, read, start, summary, write

from distill.planning.costs import Costs
from distill.planning.placement.problems import broadcast_problem
from distill.planning.placement.search import Problem
from distill.simulation.command import measured

SETUPS = ("measured", "flops")  # values of plan.cost
HALF = (2 / 3, 4 / 3)  # slowness of a whole and of a half speed, over their mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", default="cifar_resnet20")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    job = _job(args)
    rounds = [_round(job, args.scratch.absolute() / f"round{n}") for n in range(args.rounds)]
    what = (
        f"{args.network}, distill stage, batch {args.batch_size}, {args.steps} steps a block, rank 1 of 2 at half speed"
    )
    write("uneven_ranks", {"what": what, "setups": {name: _result(rounds, name) for name in SETUPS}})


def _job(args: argparse.Namespace) -> tuple[str, ...]:
    weights = random_weights(args.network, args.scratch)
    return (
        f"teacher={args.network}", f"teacher.weights={weights}", "data=hf", f"data.root={args.data.absolute()}",
        f"data.batch_size={args.batch_size}", f"distill.steps={args.steps}", "stage=distill", "device=cpu",
        "launch.threads_per_rank=1", "launch.nproc_per_node=2", "plan.strategy=broadcast", "plan.teacher_ranks=1",
    )  # fmt: skip


def _round(job: tuple[str, ...], folder: Path) -> dict[str, Any]:
    found = {}
    for name in SETUPS:
        run_dir = folder / name
        _run_slowed(*job, f"plan.cost={name}", run_dir=run_dir)
        found[name] = {
            "stage": read(run_dir / "stages" / "distill.json"),
            "plan": read(run_dir / "plan.json"),
            "costs": read(run_dir / "costs.json"),
        }
    costs, spans = measured(folder / "measured", speed=1.0, steps=None)
    problem = broadcast_problem(_at_true_speeds(costs), spans, 2)
    blocks = [span.unit for span in spans]
    best = min(_makespan(problem, owner) for owner in itertools.product(range(2), repeat=len(blocks)))
    for one in found.values():
        owner = [int(block in one["plan"]["owners"][1]) for block in blocks]
        one["planned_over_optimum"] = _makespan(problem, owner) / best
        one["measured_over_optimum"] = one["stage"]["seconds"] / best
    return found


def _at_true_speeds(costs: Costs) -> Costs:
    """The costs as measured, the mean over both ranks, for one rank at full and one at half speed."""
    return Costs(costs.teacher_s, costs.student_s, costs.boundary_bytes, slowness=HALF, network=costs.network)


def _makespan(problem: Problem, owner: Any) -> float:
    return float(problem.packing.seconds(np.array(owner)).max())


def _run_slowed(*overrides: str, run_dir: Path) -> None:
    """Run with rank r held on core r, and company for rank 1."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    company = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(company.pid, {cores[1]})
        process = start(*overrides, run_dir=run_dir)
        held: set[int] = set()
        while len(held) < len(cores) and process.poll() is None:
            for pid in process_tree(process.pid) - held:
                rank = _rank_of(pid)
                if rank is not None:
                    _hold(pid, cores[rank])
                    held.add(pid)
            time.sleep(0.05)
        finish(process, run_dir)
    finally:
        company.kill()
        company.wait()


def _rank_of(pid: int) -> int | None:
    """The rank of a process, None where it is none."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(pair[5:]) for pair in pairs if pair.startswith(b"RANK=")), None)


def _hold(pid: int, core: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def _result(rounds: list[dict[str, Any]], name: str) -> dict[str, Any]:
    ones = [found[name] for found in rounds]
    return {
        "seconds": summary([one["stage"]["seconds"] for one in ones]),
        "predicted_s": summary([one["stage"]["makespan_predicted_s"] for one in ones]),
        "planned_over_optimum": summary([one["planned_over_optimum"] for one in ones]),
        "measured_over_optimum": summary([one["measured_over_optimum"] for one in ones]),
        "idle_share": [one["stage"]["idle_share"] for one in ones],
        "slowness_found": [one["costs"]["slowness"] for one in ones],
        "blocks_of_rank_1": [len(one["plan"]["owners"][1]) for one in ones],
    }


if __name__ == "__main__":
    main()
