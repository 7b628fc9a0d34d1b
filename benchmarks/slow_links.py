"""Every strategy on two hosts of one rank each, joined by 10, 1 and 0.1 Gbit/s: is `auto` within 5 % of the best?

    python benchmarks/slow_links.py SCRATCH --data PARQUET_FILE [--gbit 10 1 0.1] [--rounds 1] [--steps 12]

The hosts are network namespaces on this machine (benchmarks/hosts.py; needs root), the ranks have one thread each and
run the real command. Strategies without traffic are measured once a round, over the first link. Teachers have random
weights: a step costs the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hosts import HOSTS, Hosts, joined
from measure import ROOT, read, summary, write

from distill.teachers import build_architecture

STRATEGIES = ("auto", "broadcast", "relay", "replicate", "layerwise", "ddp")
SILENT = ("replicate", "layerwise")
CHOSEN_FROM = ("broadcast", "relay", "replicate")
PORT = 29477


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
    weights = args.scratch.absolute() / "resnet20.pt"
    if not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        torch.save(build_architecture(source="cifar", name="cifar_resnet20", num_classes=10).state_dict(), weights)
    return [
        "teacher=cifar_resnet20", f"teacher.weights={weights}", "blocks.granularity=residual", "data=hf",
        f"data.root={args.data.absolute()}", f"data.batch_size={args.batch_size}", f"distill.steps={args.steps}",
        "stage=distill", "launch.threads_per_rank=1", "launch.nnodes=2", f"launch.rdzv_endpoint=hostA:{PORT}",
    ]  # fmt: skip


def _round(hosts: Hosts, job: list[str], args: argparse.Namespace, folder: Path) -> dict[tuple[float, str], Any]:
    found: dict[tuple[float, str], Any] = {}
    for gbit in args.gbit:
        hosts.limit(gbit)
        for strategy in args.strategies:
            if strategy in SILENT and gbit != args.gbit[0]:
                found[gbit, strategy] = found[args.gbit[0], strategy]
                continue
            run_dir = folder / f"{gbit:g}" / strategy
            _run(hosts, [*job, f"plan.strategy={strategy}"], run_dir)
            found[gbit, strategy] = read(run_dir / "stages" / "distill.json")
    return found


def _run(hosts: Hosts, job: list[str], run_dir: Path) -> None:
    """Run the command on both hosts and wait; a failure stops the benchmark with the run's own words."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    started = []
    for host, address in HOSTS.items():
        here = str(host == "hostA").lower()
        options = [f"launch.local_addr={address}", f"launch.rdzv_here={here}", f"run.dir={run_dir}"]
        command = hosts.on(host, [sys.executable, "-m", "distill", *job, *options])
        with Path(f"{run_dir}.{host}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment | {"GLOO_SOCKET_IFNAME": "eth0"}, stdout=log, stderr=log
                )
            )
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"a run failed:\n{Path(f'{run_dir}.hostA.log').read_text()[-3000:]}")


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
    rivals = [result[strategy]["seconds"]["median"] for strategy in CHOSEN_FROM if strategy in runs]
    if "auto" in runs and rivals:
        result["auto_over_best"] = result["auto"]["seconds"]["median"] / min(rivals)
    return result


if __name__ == "__main__":
    main()
