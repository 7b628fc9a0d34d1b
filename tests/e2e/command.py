"""Runs the real command on the smallest job that still has every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMALL = (
    "data.image_size=8",
    "teacher.fit.epochs=1",
    "distill.steps=4",
    "finetune.epochs=1",
    "assemble.batchnorm_batches=2",
    "launch.threads_per_rank=1",
)
ONE_BLOCK = (  # after SMALL: long enough to be stopped in
    "blocks.include=[layer3.2]",
    "distill.steps=400",
    "checkpoint.every=10",
    "finetune.epochs=0",
    "plan.cost=flops",
)
LIMIT_S = 240


def environment() -> dict[str, str]:
    """This process's environment without a launcher's traces."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}


def distill(*overrides: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `python -m distill` with these overrides after SMALL."""
    command = [sys.executable, "-m", "distill", *SMALL, f"launch.nproc_per_node={ranks}", *overrides]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def torchrun(*overrides: str, cwd: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    """Run `torchrun -m distill` with these overrides after SMALL."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "distill", *SMALL, *overrides]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def metrics(run_dir: Path) -> Mapping[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())


def bits(run_dir: Path) -> dict[str, str]:
    """Checksum of every block in the ledger."""
    lines = (run_dir / "ledger.jsonl").read_text().splitlines()
    return {entry["name"]: entry["sha256"] for entry in map(json.loads, lines)}
