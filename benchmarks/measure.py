"""What all benchmarks share: running the real command, facts about the machine, and result files."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.teachers import build_architecture

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def start(
    *overrides: str, run_dir: Path, on: Callable[[list[str]], list[str]] = list, **environment: str
) -> subprocess.Popen[bytes]:
    """Start `python -m distill` with these overrides; its output goes to run_dir.log. `on` turns a command into the one
    that runs it elsewhere."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = on([sys.executable, "-m", "distill", *overrides, f"run.dir={run_dir}"])
    with Path(f"{run_dir}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=inherited | environment, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Wait for a started run; a failure stops the benchmark with the run's own words."""
    if process.wait() != 0:
        raise SystemExit(f"a run failed:\n{Path(f'{run_dir}.log').read_text()[-3000:]}")


def run(*overrides: str, run_dir: Path, **environment: str) -> float:
    """Run to the end and return the wall seconds of the whole command."""
    begin = time.monotonic()
    finish(start(*overrides, run_dir=run_dir, **environment), run_dir)
    return time.monotonic() - begin


def children_cpu_seconds() -> float:
    """Return what all processes that have been waited for have taken of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def process_tree(pid: int) -> set[int]:
    """Return a process and all that it has started, as far as they live (Linux)."""
    children: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            children.update(map(int, task.read_text().split()))
    return {pid}.union(*map(process_tree, children))


def random_weights(name: str, folder: Path) -> Path:
    """Return a file with random weights of one of the CIFAR teachers: its steps cost what those of a trained one do."""
    path = folder.absolute() / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        torch.save(build_architecture(source="cifar", name=name, num_classes=10).state_dict(), path)
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def block_bits(run_dir: Path) -> dict[str, str]:
    """Checksum of every trained block."""
    entries = map(json.loads, (run_dir / "ledger.jsonl").read_text().splitlines())
    return {entry["name"]: entry["sha256"] for entry in entries}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of repeated measurements, with the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def machine() -> dict[str, Any]:
    """Hardware, versions and commit."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
        flags = {flag for line in cpuinfo.read_text().splitlines() if line.startswith("flags") for flag in line.split()}
        model += " with " + ", ".join(sorted(flags & {"avx2", "avx512f", "amx_bf16"}))
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
    }


def _commit() -> str:
    """Return what COMMIT says, where what is measured is a copy without its history; else this repository's commit."""
    if said := os.environ.get("COMMIT"):
        return said
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "distill", "conf") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


MACHINE = machine()  # as the benchmark starts: the commit may move on while it runs


def write(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": MACHINE, **result}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
