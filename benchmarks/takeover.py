"""The distill stage with and without take-over, where blocks stop at a plateau and ranks run dry at different times.

    python benchmarks/takeover.py SCRATCH [--strategies broadcast relay] [--rounds 5] [--steps 400] [--ranks 2]

All set-ups alternate within every round; medians over rounds. Digits, so nothing is downloaded; the teacher has random
weights: a step costs the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import block_bits, random_weights, read, run, summary, write

SETUPS = {"staying": "false", "moving": "true"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--strategies", nargs="+", default=["broadcast", "relay"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--check-every", type=int, default=20)
    args = parser.parse_args()
    weights = random_weights("cifar_resnet20", args.scratch)
    job = (
        f"teacher.weights={weights}", "stage=distill", "distill.stop=plateau", "distill.patience=2",
        f"distill.check_every={args.check_every}", "distill.check_batches=2", f"distill.steps={args.steps}",
        f"launch.nproc_per_node={args.ranks}", "launch.threads_per_rank=1",
    )  # fmt: skip
    rounds = [_round(job, args.strategies, args.scratch.absolute() / f"round{n}") for n in range(args.rounds)]
    what = f"distill stage of ResNet-20 on digits to a plateau, {args.ranks} ranks of one thread"
    write("takeover", {"what": what, "strategies": {name: _result(rounds, name) for name in args.strategies}})


def _round(job: tuple[str, ...], strategies: list[str], folder: Path) -> dict[tuple[str, str], Any]:
    found, bits = {}, []
    for strategy in strategies:
        for name, moves in SETUPS.items():
            run_dir = folder / f"{strategy}-{name}"
            run(*job, f"plan.strategy={strategy}", f"plan.take_over={moves}", run_dir=run_dir)
            found[strategy, name] = read(run_dir / "stages" / "distill.json")
            bits.append(block_bits(run_dir))
    assert all(other == bits[0] for other in bits), "a take-over changed the students"
    return found


def _result(rounds: list[dict[tuple[str, str], Any]], strategy: str) -> dict[str, Any]:
    staying, moving = ([found[strategy, name] for found in rounds] for name in SETUPS)
    faster = [before["seconds"] / after["seconds"] for before, after in zip(staying, moving, strict=True)]
    return {"staying": _setup(staying), "moving": _setup(moving), "times_faster": summary(faster)}


def _setup(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seconds": summary([result["seconds"] for result in found]),
        "take_overs": summary([result["take_overs"] for result in found]),
        "teacher_passes": summary([result["teacher_passes"] for result in found]),
        "mean_idle_share": summary([sum(result["idle_share"]) / len(result["idle_share"]) for result in found]),
    }


if __name__ == "__main__":
    main()
