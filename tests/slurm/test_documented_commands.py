"""docs/slurm.md by its own commands, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import fenced
from tests.e2e.command import SMALL, bits, metrics
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import LIMIT_S, ROOT, UNEVEN, activated, finish, finished_some, wait_while_running

SUBMIT, WATCH, STOP, CONTINUE, SWEEP = fenced("docs/slurm.md", "sh")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder to submit from, with the scripts where the page says they are."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    return tmp_path


def typed(slurm: Cluster, commands: str, *small: str, cwd: Path) -> str:
    """Run commands of the page with small settings after sbatch's; return what they print."""
    settings = " ".join(f"'{setting}'" for setting in small)
    shell = f'set -eu; sbatch() {{ command sbatch "$@" {settings}; }}\n{commands}'
    return slurm.run("bash", "-c", shell, cwd=cwd, env=activated() | {"USER": "root"})


def job_of(printed: str) -> str:
    found = re.search(r"Submitted batch job (\d+)", printed)
    assert found, printed
    return found[1]


def test_a_job_is_submitted_watched_stopped_and_continued(slurm: Cluster, checkout: Path) -> None:
    run_dir = checkout / "runs" / "digits"
    job = job_of(typed(slurm, SUBMIT, *UNEVEN, cwd=checkout))
    wait_while_running(slurm, job, lambda: bool(finished_some(run_dir)))
    seen = typed(slurm, WATCH, cwd=checkout)
    assert job in seen
    assert "plan: broadcast" in seen
    typed(slurm, STOP, cwd=checkout)
    assert slurm.wait_state(job, "CANCELLED", "COMPLETED", timeout_s=LIMIT_S)["JobState"] == "CANCELLED"
    finish(slurm, job_of(typed(slurm, CONTINUE, *UNEVEN, cwd=checkout)))
    assert metrics(run_dir)["distill"]["resumed"]
    assert len(bits(run_dir)) == 9


def test_a_sweep_runs_as_an_array_and_a_task_is_queued_again_alone(slurm: Cluster, checkout: Path) -> None:
    longer = (*SMALL, "distill.steps=100", "checkpoint.every=10", "finetune.epochs=0")
    printed = typed(slurm, SWEEP, *longer, cwd=checkout)
    assert printed.splitlines()[:2] == ["student.rank=1", "student.rank=2"]
    first, second = (f"{job_of(printed)}_{task}" for task in (0, 1))
    wait_while_running(slurm, first, lambda: "plan: broadcast" in slurm.output(first))
    slurm.signal_batch(first, "USR1")
    assert finish(slurm, second)["Restarts"] == "0"
    assert finish(slurm, first)["Restarts"] == "1"
    logs = [slurm.output(task) for task in (first, second)]
    for rank, log in enumerate(logs, start=1):
        assert f"of the sweep: student.rank={rank} " in log
    runs = [re.findall(r"student: (.*)/student\.safetensors", log) for log in logs]
    assert [len(set(found)) for found in runs] == [1, 1]
    assert runs[0] != runs[1]


def test_an_array_that_is_longer_than_the_sweep_says_how_long_it_is(slurm: Cluster, checkout: Path) -> None:
    (beyond,) = re.findall(r"^sbatch .*$", SWEEP.replace("0-1", "2"), re.MULTILINE)
    job = job_of(typed(slurm, beyond, cwd=checkout))
    slurm.wait_state(f"{job}_2", "FAILED", timeout_s=LIMIT_S)
    assert "this sweep has 2 jobs: --array=0-1" in slurm.output(f"{job}_2").splitlines()[-1]
