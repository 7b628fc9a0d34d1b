"""Runs the real command on the smallest job that still has every stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SMALL = (
    "data.image_size=8",
    "teacher.fit.epochs=2",
    "distill.steps=4",
    "finetune.epochs=1",
    "assemble.batchnorm_batches=2",
    "assemble.refit_images=64",
    "launch.threads_per_rank=1",
    "deploy.programs=[]",  # to export them takes longer than all else
)
FINISHED = ("refine=progressive", "refine.steps=2")  # after SMALL: the run that many look at
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


def interrupt_after_first_checkpoint(*job: str, cwd: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Start the job on two ranks, run directory cwd/broken, and press Ctrl-C once a block has been checkpointed; do
    something before, while rank 0 stands still."""
    command = [sys.executable, "-m", "distill", *SMALL, *job, "run.dir=broken", "launch.nproc_per_node=2"]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((cwd / "broken" / "checkpoints").glob("[0-9]*.safetensors")):
        assert process.poll() is None, "the job ended before it wrote a checkpoint"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.02)
    leader = json.loads((cwd / "broken" / "lease.json").read_text())["pid"]
    os.kill(leader, signal.SIGSTOP)
    try:
        meanwhile()
    finally:
        os.kill(leader, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on where this run was" in errors
    assert "Traceback" not in errors


def metrics(run_dir: Path) -> Mapping[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())


def bits(run_dir: Path) -> dict[str, str]:
    """Checksum of every block in the ledger."""
    lines = (run_dir / "ledger.jsonl").read_text().splitlines()
    return {entry["name"]: entry["sha256"] for entry in map(json.loads, lines)}
