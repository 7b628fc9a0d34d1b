"""The distill stage under every strategy on one and two ranks of one thread, and against what the machine can do.

    python benchmarks/strategies.py SCRATCH --data PARQUET_FILE [--networks resnet20 vgg16_bn] [--rounds 5] [--steps 30]

The limit is two independent one-rank runs side by side: the same work twice, with nothing to exchange. All set-ups of a
network take turns of a few seconds within every round (turns.py); medians over rounds. Any parquet file with CIFAR-10
images will do: the smaller test file loads faster and costs the same per step. Teachers have random weights: a step
costs the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import block_bits, random_weights, summary, write
from turns import Turns, here, take_turns

NETWORKS = {
    "resnet20": ("teacher=cifar_resnet20", "blocks.granularity=residual"),
    "resnet44": ("teacher=cifar_resnet44", "blocks.granularity=residual"),
    "vgg16_bn": ("teacher=cifar_vgg16_bn", "blocks.granularity=conv", "student.first_layer=true"),
}
SETUPS = {  # name: ranks, strategy
    "serial_1": (1, "serial"),
    "shared_1": (1, "broadcast"),
    "layerwise_2": (2, "layerwise"),
    "ddp_2": (2, "ddp"),
    "broadcast_2": (2, "broadcast"),
    "relay_2": (2, "relay"),
    "replicate_2": (2, "replicate"),
    "auto_2": (2, "auto"),
}
SIDE_BY_SIDE = ("left", "right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "vgg16_bn"])
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    networks = {}
    for network in args.networks:
        job = _job(network, args)
        rounds = [_round(job, args, args.scratch.absolute() / network / f"round{n}") for n in range(args.rounds)]
        networks[network] = _result(rounds)
    what = f"distill stage, batch {args.batch_size}, {args.steps} steps a block, measured costs, one thread a rank"
    write("strategies", {"what": what, "networks": networks})


def _job(network: str, args: argparse.Namespace) -> tuple[str, ...]:
    name = NETWORKS[network][0].partition("=")[2]
    return (
        *NETWORKS[network],
        f"teacher.weights={random_weights(name, args.scratch)}",
        "data=hf",
        f"data.root={args.data.absolute()}",
        f"data.batch_size={args.batch_size}",
        f"distill.steps={args.steps}",
        "stage=distill",
        "launch.threads_per_rank=1",
    )


def _round(job: tuple[str, ...], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    setups = {name: SETUPS[name] for name in args.setups}
    contestants = [
        Turns({name: here(*job, f"launch.nproc_per_node={ranks}", f"plan.strategy={strategy}")}, folder)
        for name, (ranks, strategy) in setups.items()
    ]
    contestants.append(Turns(dict.fromkeys(SIDE_BY_SIDE, here(*job)), folder))
    take_turns(contestants)
    bits = [block_bits(folder / name) for name in (*setups, *SIDE_BY_SIDE) if name != "ddp_2"]
    assert all(found == bits[0] for found in bits), "a strategy changed the students"
    return {name: result for one in contestants for name, result in one.results().items()}


def _result(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in rounds[0] if name not in SIDE_BY_SIDE]

    def over(name: str, key: str) -> dict[str, Any]:
        return summary([found[name][key] for found in rounds])

    def ratio(of: str, to: str) -> dict[str, Any]:
        return summary([found[of]["seconds"] / found[to]["seconds"] for found in rounds])

    # what two ranks would take if the work were halved for nothing: the rates of two whole runs side by side, added
    limits = [1 / (1 / found["left"]["seconds"] + 1 / found["right"]["seconds"]) for found in rounds]
    two = [name for name in names if name.endswith("_2")]
    return {
        "setups": {
            name: {
                "seconds": over(name, "seconds"),
                "predicted_s": over(name, "makespan_predicted_s"),
                "predicted_over_measured": summary(
                    [found[name]["makespan_predicted_s"] / found[name]["seconds"] for found in rounds]
                ),
                "cpu_seconds": over(name, "cpu_seconds"),
                "mean_idle_share": summary(
                    [sum(found[name]["idle_share"]) / len(found[name]["idle_share"]) for found in rounds]
                ),
                "bytes_sent": rounds[0][name]["bytes_sent"],
                "strategy": sorted({found[name]["strategy"] for found in rounds}),
            }
            for name in names
        },
        "seconds_side_by_side": summary([2 * limit for limit in limits]),
        "cpu_seconds_side_by_side": summary(
            [(found["left"]["cpu_seconds"] + found["right"]["cpu_seconds"]) / 2 for found in rounds]
        ),
        "of_the_limit": {
            name: summary([limit / found[name]["seconds"] for limit, found in zip(limits, rounds, strict=True)])
            for name in two
        },
        "times_faster_than": {
            f"{slow} -> {fast}": ratio(slow, fast)
            for slow, fast in [
                ("serial_1", "shared_1"), ("layerwise_2", "shared_1"), ("layerwise_2", "auto_2"), ("ddp_2", "auto_2"),
                ("shared_1", "auto_2"),
            ]
            if slow in names and fast in names
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
