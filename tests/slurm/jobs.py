"""Jobs of distill on the cluster of these tests: small, with blocks that finish far apart."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.e2e.command import SMALL, bits, environment
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240.0
# Most blocks stop after 30 or 40 steps and two go on for 200: time enough to interrupt a job that has finished some.
UNEVEN = (
    *SMALL,
    "distill.steps=400",
    "distill.stop=plateau",
    "distill.check_every=10",
    "distill.check_batches=1",
    "distill.patience=2",
    "distill.min_delta=0.02",
    "checkpoint.every=10",
    "plan.cost=flops",
)


def activated() -> dict[str, str]:
    """The environment of a user who has activated the environment that these tests run in."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return environment() | {"PATH": path, "PYTHONPATH": str(ROOT)}


def submit(slurm: Cluster, *overrides: str, cwd: Path, options: Sequence[str] = ("--nodes=2",)) -> str:
    """Submit slurm/distill.sbatch; return the job's id."""
    script = ROOT / "slurm" / "distill.sbatch"
    return slurm.submit(script, *overrides, cwd=cwd, options=options, env=activated())


def finish(slurm: Cluster, job: str) -> dict[str, str]:
    """Wait for the job to complete; return its facts. Anything else than completion fails the test with the log."""
    facts = slurm.wait_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=LIMIT_S)
    assert facts["JobState"] == "COMPLETED", slurm.output(job)
    return facts


def wait_while_running(slurm: Cluster, job: str, reached: Callable[[], bool]) -> None:
    """Wait until something is so about a job that has not come to its end."""
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < deadline, slurm.output(job)
        # while it is queued again, a job passes through states of its own for a moment
        assert slurm.facts(job)["JobState"] not in ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"), slurm.output(job)
        time.sleep(0.05)


def finished_some(run_dir: Path) -> list[str]:
    """Return the blocks in the ledger, once there are some and others have begun; until then nothing."""
    if not (run_dir / "ledger.jsonl").exists() or not list((run_dir / "checkpoints").glob("[0-9]*.safetensors")):
        return []
    return list(bits(run_dir))
