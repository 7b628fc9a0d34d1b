"""slurm/distill.sbatch on a real Slurm: two nodes give one node's bits, whatever interrupts the job."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.command import SMALL, bits, metrics
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import LIMIT_S, UNEVEN, finish, finished_some, submit, wait_while_running


@pytest.fixture(scope="module")
def one_node(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an undisturbed job of two ranks on one node."""
    cwd = tmp_path_factory.mktemp("one_node")
    options = ("--nodes=1", "--cpus-per-task=2")
    finish(slurm, submit(slurm, *UNEVEN, "launch.nproc_per_node=2", "run.dir=run", cwd=cwd, options=options))
    return cwd / "run"


def assert_same_student(run_dir: Path, reference: Path) -> None:
    assert len(bits(run_dir)) == 9
    assert bits(run_dir) == bits(reference)
    for name in ("teacher.safetensors", "student.safetensors"):
        assert (run_dir / name).read_bytes() == (reference / name).read_bytes()


def test_two_nodes_end_in_the_student_of_one_node(slurm: Cluster, one_node: Path, tmp_path: Path) -> None:
    job = submit(slurm, *UNEVEN, "run.dir=run", cwd=tmp_path)
    facts = finish(slurm, job)
    assert facts["Restarts"] == "0"
    assert "2 nodes (hostA,hostB)" in slurm.output(job)
    assert metrics(tmp_path / "run")["distill"]["world_size"] == 2
    assert_same_student(tmp_path / "run", one_node)


def interrupt(slurm: Cluster, cwd: Path, how: str) -> tuple[str, set[str]]:
    """Submit a job and interrupt it when some of its blocks are finished; return its id and those blocks' names."""
    job = submit(slurm, *UNEVEN, "run.dir=run", cwd=cwd)
    wait_while_running(slurm, job, lambda: bool(finished_some(cwd / "run")))
    finished = set(finished_some(cwd / "run"))
    if how == "requeue":
        slurm.requeue(job)
    elif how == "signal":
        slurm.signal_batch(job, "USR1")
    else:
        urgent = cwd / "urgent.sbatch"
        urgent.write_text("#!/bin/bash\ntrue\n")
        slurm.submit(urgent, cwd=cwd, options=("--nodes=2", "--exclusive", "--partition=high"))
    return job, finished


def told_finished(log: str) -> list[str]:
    """Return the names of the blocks whose end a log tells."""
    return [line.split()[1] for line in log.splitlines() if line.startswith("block ") and " finished on " in line]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("requeue", "stopped by Slurm"),
        ("signal", "the time limit is near: the ranks have been stopped and the job is queued again"),
        ("preemption", "preempted: the ranks have been stopped; waiting for Slurm to queue the job again"),
    ],
)
def test_an_interrupted_job_goes_on_by_itself_to_the_same_student(
    slurm: Cluster, one_node: Path, tmp_path: Path, how: str, words: str
) -> None:
    job, finished = interrupt(slurm, tmp_path, how)
    wait_while_running(slurm, job, lambda: slurm.facts(job)["Restarts"] == "1")
    before = slurm.output(job)
    assert finish(slurm, job)["Restarts"] == "1"
    log = slurm.output(job)
    assert words in log
    assert f"job {job}, restart 1: 2 nodes" in log
    assert "(attempt 2)" in log
    assert log.startswith(before[:1000]), "the log is continued, not begun anew"
    assert metrics(tmp_path / "run")["distill"]["resumed"]
    assert_same_student(tmp_path / "run", one_node)
    first, second = (told_finished(part) for part in log.split("(attempt 2)"))
    # compared with the ledger and not with the log alone: a rank that is stopped between the two tells the end no more
    assert not set(second) & {*first, *finished}, "no finished block is trained again"
    assert second, "the interrupted job had something left to do"


def failed(slurm: Cluster, job: str) -> str:
    """Wait for the job to fail; return the last line of its log."""
    facts = slurm.wait_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=LIMIT_S)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "1:0", "0"), slurm.output(job)
    return slurm.output(job).splitlines()[-1]


def test_a_job_with_a_mistake_ends_its_log_with_what_it_is(slurm: Cluster, tmp_path: Path) -> None:
    wrong = submit(slurm, *SMALL, "distill.stepz=4", cwd=tmp_path)
    missing = submit(slurm, *SMALL, "data=imagefolder", "data.root=/nowhere", cwd=tmp_path)
    assert failed(slurm, wrong).startswith(
        f"distill: job {wrong} failed: distill.stepz: this setting does not exist; expected 'distill.steps'"
    )
    assert failed(slurm, missing) == (
        f"distill: job {missing} failed: data.root: got '/nowhere'; expected an existing folder (looked for /nowhere)"
    )


def rank_on(slurm: Cluster, host: str) -> int:
    """Return the process id of the one rank on a host."""
    for pid in slurm.processes(host):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"\0-u\0-m\0distill\0" in file.read():
                return pid
    raise AssertionError(f"no rank runs on {host}")


def test_a_rank_that_is_killed_on_the_other_node_is_named_last(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, *UNEVEN, "run.dir=run", cwd=tmp_path)
    wait_while_running(slurm, job, lambda: bool(finished_some(tmp_path / "run")))
    os.kill(rank_on(slurm, "hostB"), signal.SIGKILL)
    reason = failed(slurm, job)
    assert reason == (
        f"distill: job {job} failed: rank 1 on hostB was killed by signal 9 (SIGKILL), perhaps for want of memory "
        "(--mem)"
    )
    assert slurm.facts(job)["JobState"] == "FAILED", "a failed job is not queued again"


def test_an_error_on_the_other_node_in_the_middle_is_told_last(slurm: Cluster, tmp_path: Path) -> None:
    quick = ("distill.steps=300", "checkpoint.every=100", "plan.cost=flops")
    job = submit(slurm, *SMALL, *quick, "run.dir=run", cwd=tmp_path)
    plan = tmp_path / "run" / "plan.json"
    wait_while_running(slurm, job, plan.exists)
    for block in json.loads(plan.read_text())["owners"][
        1
    ]:  # a folder in the place of a checkpoint: it cannot be written
        (tmp_path / "run" / "checkpoints" / f"{block:02d}.safetensors").mkdir(parents=True)
    reason = failed(slurm, job)
    assert reason.startswith(f"distill: job {job} failed: {tmp_path}/run/checkpoints/"), slurm.output(job)
    assert reason.endswith("safetensors: a folder is in its place; remove it")
