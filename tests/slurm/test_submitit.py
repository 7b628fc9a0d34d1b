"""Sweeps whose jobs Slurm runs by Hydra's submitit launcher: on one node, on two, requeued, failing, cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import ONE_BLOCK, SMALL, environment
from tests.slurm.cluster import Cluster

JOB = (
    *SMALL,
    *ONE_BLOCK,
    "run.name=swept",
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.timeout_min=5",
)
LIMIT_S = 200
pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")


def start(slurm: Cluster, cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a sweep where a user would, on the login node."""
    command = [sys.executable, "-u", "-m", "distill", "--multirun", *JOB, *overrides]
    with (cwd / "sweep.out").open("w") as out:
        return subprocess.Popen(
            slurm.on("hostS", command), cwd=cwd, env=environment() | slurm.environment, stdout=out, stderr=out
        )


def finish(sweep: subprocess.Popen[str], cwd: Path, status: int) -> str:
    """Wait for a sweep and return what it printed."""
    sweep.wait(LIMIT_S)
    printed = (cwd / "sweep.out").read_text()
    logs = [path.read_text()[-2000:] for path in cwd.glob("outputs/sweeps/*/.submitit/*/*.err")]
    assert sweep.returncode == status, "\n".join([printed, *logs])
    return printed


def until(reached: Callable[[], bool], sweep: subprocess.Popen[str], cwd: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert sweep.poll() is None, (cwd / "sweep.out").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def jobs(cwd: Path) -> list[dict[str, Any]]:
    """The jobs of the sweep that was written last."""
    last = max((cwd / "outputs" / "sweeps").glob("*/sweep.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(last.read_text())["jobs"]


def submitted(cwd: Path) -> str:
    """The id of the only job that the sweep has submitted."""
    words = (cwd / "sweep.out").read_text().partition("sweep: submitted ")[2]
    return words.partition(";")[0]


@pytest.fixture(scope="module")
def one_node(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep of two jobs of one node, the second of which finds no teacher; and what it printed."""
    cwd = tmp_path_factory.mktemp("submitit")
    (cwd / "broken.pt").write_text("no weights")
    sweep = start(slurm, cwd, "teacher.weights=null,broken.pt")
    return cwd, finish(sweep, cwd, 1)


def test_jobs_run_under_slurm_and_one_failing_leaves_the_other(one_node: tuple[Path, str]) -> None:
    cwd, printed = one_node
    good, bad = jobs(cwd)
    assert (good["status"], bad["status"], bad["exit_status"]) == ("finished", "failed", 1)
    assert f"teacher.weights: got '{cwd}/broken.pt'" in bad["reason"]
    assert bad["reason"] in printed
    assert (Path(good["run_dir"]) / "student.safetensors").exists()
    assert {path.name for path in cwd.iterdir()} == {"outputs", "sweep.out", "broken.pt"}


def test_a_job_of_two_nodes_goes_on_after_it_was_requeued(one_node: tuple[Path, str], slurm: Cluster) -> None:
    cwd, _ = one_node
    sweep = start(slurm, cwd, "seed=0,1", "hydra.launcher.nodes=2", "launch=slurm")

    def folders() -> list[Path]:
        return [path.parents[1] for path in cwd.glob("outputs/swept/*/checkpoints/[0-9]*.safetensors")]

    until(lambda: len(folders()) > 0, sweep, cwd)
    [run_dir] = folders()
    slurm.requeue(submitted(cwd))
    finish(sweep, cwd, 0)
    assert [job["status"] for job in jobs(cwd)] == ["skipped", "finished"], "one node had finished job 0 before"
    assert jobs(cwd)[1]["run_dir"] == str(run_dir)
    distill = json.loads((run_dir / "metrics.json").read_text())["distill"]
    assert distill["world_size"] == 2
    assert distill["resumed"]
    assert json.loads((run_dir / "generation.json").read_text())["generation"] == 2


def test_a_signal_to_the_sweep_cancels_its_jobs(slurm: Cluster, tmp_path: Path) -> None:
    sweep = start(slurm, tmp_path, "seed=5,6")
    until(lambda: bool(submitted(tmp_path)), sweep, tmp_path)
    os.kill(sweep.pid, signal.SIGTERM)
    printed = finish(sweep, tmp_path, 128 + signal.SIGTERM)
    assert "the same command goes on" in printed
    assert [job["status"] for job in jobs(tmp_path)] == ["stopped", "stopped"]
    array = submitted(tmp_path).partition("_")[0]
    deadline = time.monotonic() + 30
    while slurm.run("squeue", "--noheader", f"--job={array}").strip():
        assert time.monotonic() < deadline, "the jobs go on"
        time.sleep(0.2)


def test_tasks_that_would_each_run_the_whole_job_are_refused(slurm: Cluster, tmp_path: Path) -> None:
    sweep = start(slurm, tmp_path, "seed=5", "hydra.launcher.nodes=2")
    assert "add launch=slurm" in finish(sweep, tmp_path, 1)
    assert not (tmp_path / "outputs" / "swept").exists()
