"""Sweeps by the real command: one failing job does not end them, a signal does, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import LIMIT_S, ONE_BLOCK, SMALL, distill, environment

pytestmark = pytest.mark.jobs

# Two of these four jobs cannot be composed, and the ranks of one find no weights in a file.
SWEEP = (
    *ONE_BLOCK,
    "run.name=swept",
    "teacher.weights=null,broken.pt",
    "plan.window=3,1",
)
MARK = "DISTILL_TEST_MARK"


def start(cwd: Path) -> subprocess.Popen[str]:
    """Start the sweep in the background, every process of it marked with the folder's name."""
    (cwd / "broken.pt").write_text("no weights")
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "--multirun", *SMALL, "launch.nproc_per_node=1", *SWEEP],
        cwd=cwd,
        env=environment() | {MARK: str(cwd), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process: subprocess.Popen[str]) -> str:
    """Send SIGTERM and return what was printed."""
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed + errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    return printed


def running(cwd: Path) -> list[int]:
    """The processes that a sweep in this folder has left."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={cwd}".encode() in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if marked and entry.name != str(os.getpid()):
            found.append(int(entry.name))
    return found


def jobs(cwd: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text())["jobs"] for path in (cwd / "outputs" / "sweeps").glob("*/sweep.json")]
    [whole] = [jobs for jobs in found if len(jobs) == 4]  # a test makes a smaller sweep beside it
    return whole


def attempts(cwd: Path) -> dict[str, int]:
    """How often every run directory was claimed, by its tag."""
    files = (cwd / "outputs" / "swept").glob("*/generation.json")
    return {path.parent.name.split("-", 1)[1]: json.loads(path.read_text())["generation"] for path in files}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that got SIGTERM in the middle of its first job's training, and what it printed."""
    cwd = tmp_path_factory.mktemp("sweep")
    process = start(cwd)
    deadline = time.monotonic() + LIMIT_S
    while not list(cwd.glob("outputs/swept/*/checkpoints/[0-9]*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.02)
    return cwd, stop(process)


@pytest.fixture(scope="module")
def continued(stopped: tuple[Path, str]) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The same sweep started again, to its end."""
    cwd, _ = stopped
    return cwd, distill("--multirun", *SWEEP, cwd=cwd)


def test_a_signal_ends_the_sweep_and_not_just_its_job(stopped: tuple[Path, str]) -> None:
    cwd, printed = stopped
    assert running(cwd) == [], "no rank is left behind"
    assert "sweep: job 0:" in printed
    assert "sweep: job 2:" not in printed, "no further job was started"
    assert printed.count("run directory:") == 1
    assert "4 jobs, 2 stopped, 2 failed" in printed, "what was done is told all the same"


def test_the_second_start_continues_what_was_stopped(
    continued: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    cwd, _ = continued
    assert attempts(cwd) == {"plan.window-3": 2}, "in its own run directory, and no other was made"
    [run_dir] = (cwd / "outputs" / "swept").iterdir()
    assert json.loads((run_dir / "metrics.json").read_text())["distill"]["resumed"]
    assert jobs(cwd)[0]["status"] == "finished"
    assert jobs(cwd)[0]["run_dir"] == str(run_dir)


def test_failing_jobs_do_not_end_the_sweep_but_give_it_their_status(
    continued: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    cwd, result = continued
    assert result.returncode == 1
    found = jobs(cwd)
    assert [job["status"] for job in found] == ["finished", "failed", "failed", "failed"]
    assert [job["exit_status"] for job in found] == [0, 2, 1, 2]
    assert "plan.window: got 1" in found[1]["reason"]
    assert f"teacher.weights: got '{cwd}/broken.pt'" in found[2]["reason"], "the words of the rank itself"
    table = result.stdout.rpartition("1 finished, 3 failed")[2]
    assert all(job["reason"] in table for job in found), "the last table names every job with its reason"
    assert "Traceback" not in result.stderr


def test_a_finished_job_is_skipped_without_ranks(continued: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    cwd, _ = continued
    alone = [setting.replace("null,broken.pt", "null") for setting in SWEEP]
    again = distill("--multirun", *alone, cwd=cwd)
    assert "1 skipped, 1 failed" in again.stdout
    assert "run directory:" not in again.stdout
    assert attempts(cwd) == {"plan.window-3": 2}


def test_the_sweep_writes_its_comparison_and_nothing_astray(
    continued: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    cwd, _ = continued
    assert {path.name for path in cwd.iterdir()} == {"outputs", "broken.pt"}
    assert {path.name for path in (cwd / "outputs").iterdir()} == {"swept", "sweeps"}
    [run_dir] = (cwd / "outputs" / "swept").iterdir()
    pages = list((cwd / "outputs" / "sweeps").glob("*/comparison.html"))
    assert pages
    assert all(run_dir.name in page.read_text() for page in pages)


def test_a_signal_while_ranks_are_being_started_ends_the_sweep(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("sweep: job 0:"):
        assert process.poll() is None
    stop(process)
    assert running(tmp_path) == []
    assert [job["status"] for job in jobs(tmp_path)] == ["stopped", "failed", "stopped", "failed"]
    assert jobs(tmp_path)[2]["reason"] == "before it was started"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("studen.rank=1,2",), "studen: this setting does not exist; expected 'student'"),
        (("student=foo,bar",), "student: got 'foo'; expected one of bottleneck, halved, inverted, keep, lowrank, "),
        (("seed=1,1",), "run.dir:"),
        (("seed=1,2", "--resolve"), "command line: got '--resolve'"),
    ],
)
def test_a_mistake_in_every_job_is_told_at_once_and_nothing_is_written(
    settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = distill("--multirun", *settings, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
