"""Every strategy on two hosts of one rank each, joined by 10, 1 and 0.1 Gbit/s: is `auto` within 5 % of the best?

    python benchmarks/slow_links.py SCRATCH --data PARQUET_FILE [--gbit 10 1 0.1] [--rounds 1] [--steps 12]

The hosts are network namespaces on this machine (benchmarks/hosts.py; needs root), the ranks have one thread each and
run the real command; within a round all strategies take turns on the machine (turns.py). Teachers have random weights:
a step costs the same.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from hosts import HOSTS, Hosts, joined
from measure import random_weights, start, summary, write
from turns import Start, Turns, take_turns

STRATEGIES = ("auto", "broadcast", "relay", "replicate", "layerwise", "ddp")
CHOSEN_FROM = ("broadcast", "relay", "replicate")
NETWORK = "cifar_resnet20"
PORTS = range(29400, 29600, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gbit", type=float, nargs="+", default=[10.0, 1.0, 0.1])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces are removed all the same
    job = _job(args)
    with tempfile.TemporaryDirectory(prefix="distill-hosts-") as folder:
        hosts = Hosts(Path(folder))
        with joined(hosts):
            rounds = [_round(hosts, job, args, args.scratch.absolute() / f"round{n}") for n in range(args.rounds)]
    what = f"ResNet-20, distill stage, batch {args.batch_size}, {args.steps} steps a block, two hosts of one thread"
    write("slow_links", {"what": what, "links": {f"{gbit:g} Gbit/s": _result(rounds, gbit) for gbit in args.gbit}})


def _job(args: argparse.Namespace) -> list[str]:
    return [
        f"teacher={NETWORK}", f"teacher.weights={random_weights(NETWORK, args.scratch)}",
        "blocks.granularity=residual", "data=hf", f"data.root={args.data.absolute()}",
        f"data.batch_size={args.batch_size}", f"distill.steps={args.steps}", "stage=distill",
        "launch.threads_per_rank=1", "launch.nnodes=2",
    ]  # fmt: skip


def _round(hosts: Hosts, job: list[str], args: argparse.Namespace, folder: Path) -> dict[tuple[float, str], Any]:
    found: dict[tuple[float, str], Any] = {}
    for gbit in args.gbit:
        hosts.limit(gbit)
        contestants = [
            Turns({name: _on_both(hosts, [*job, f"plan.strategy={name}"], port)}, folder / f"{gbit:g}")
            for name, port in zip(args.strategies, PORTS, strict=False)
        ]
        take_turns(contestants)
        found |= {(gbit, name): stage for one in contestants for name, stage in one.results().items()}
    return found


def _on_both(hosts: Hosts, job: list[str], port: int) -> Start:
    """Return what starts the command on both hosts, which meet at this port."""

    def begin(run_dir: Path) -> list[subprocess.Popen[bytes]]:
        return [
            start(
                *job, f"launch.rdzv_endpoint=hostA:{port}", f"launch.local_addr={address}",
                f"launch.rdzv_here={str(host == 'hostA').lower()}",
                run_dir=run_dir, on=partial(hosts.on, host), GLOO_SOCKET_IFNAME="eth0",
            )
            for host, address in HOSTS.items()
        ]  # fmt: skip

    return begin


def _result(rounds: list[dict[tuple[float, str], Any]], gbit: float) -> dict[str, Any]:
    runs = {strategy: [found[gbit, strategy] for found in rounds] for at, strategy in rounds[0] if at == gbit}
    result: dict[str, Any] = {
        strategy: {
            "seconds": summary([run["seconds"] for run in found]),
            "predicted_over_measured": summary([run["makespan_predicted_s"] / run["seconds"] for run in found]),
            "bytes_sent": found[0]["bytes_sent"],
            "strategy": sorted({run["strategy"] for run in found}),
        }
        for strategy, found in runs.items()
    }
    if {"auto", *CHOSEN_FROM} <= runs.keys():
        best = [min(runs[strategy][n]["seconds"] for strategy in CHOSEN_FROM) for n in range(len(rounds))]
        result["auto_over_best"] = summary(
            [run["seconds"] / least for run, least in zip(runs["auto"], best, strict=True)]
        )
    return result


if __name__ == "__main__":
    main()
