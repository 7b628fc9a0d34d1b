"""The batch scripts without a Slurm: what a node starts from what it was given, and what a log gives as the reason."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config import shipped
from distill.config.compose import compose

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm"
NODE = {
    "SLURM_JOB_ID": "1001",
    "SLURM_NNODES": "4",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "n17",
    "SLURM_CPUS_ON_NODE": "16",
    "rdzv_id": "1001-0",
    "rdzv_endpoint": "n17:28008",
}


def bash(
    script: str, *arguments: str, path: str = "/usr/bin:/bin", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run bash with the functions of distill.sbatch."""
    command = ["bash", "-c", f"source {SCRIPTS}/distill.sbatch; {script}", "bash", *arguments]
    return subprocess.run(
        command, env=NODE | environment | {"PATH": path}, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.fixture
def echo(tmp_path: Path) -> str:
    """A PATH whose python only prints what it was called with, and OMP_NUM_THREADS."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" "OMP=$OMP_NUM_THREADS"\n')
    (tmp_path / "python").chmod(0o755)
    return f"{tmp_path}:/usr/bin:/bin"


def test_a_command_says_where_the_scripts_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert shipped.main([]) == 0
    assert Path(capsys.readouterr().out.rstrip("\n")) == SCRIPTS
    with pytest.raises(SystemExit) as caught:
        shipped.main(["distill.sbatch"])
    assert caught.value.code == 2
    assert "unrecognized arguments: distill.sbatch" in capsys.readouterr().err


def started(echo: str, *overrides: str, **environment: str) -> str:
    result = bash('bash -c "$on_a_node" torchrun "$@"', *overrides, path=echo, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_node_without_gpus_runs_one_rank_with_all_its_cpus(echo: str) -> None:
    line = started(echo, "data.root=/two words")
    assert "--nnodes=4 --nproc-per-node=1 " in line
    assert "--rdzv-endpoint=n17:28008 --rdzv-id=1001-0 --rdzv-conf=is_host=1 --local-addr=n17" in line
    assert line.endswith("-m distill launch.threads_per_rank=16 data.root=/two words OMP=16\n")


def test_a_node_with_gpus_runs_a_rank_on_each_and_shares_its_cpus(echo: str) -> None:
    line = started(echo, SLURM_GPUS_ON_NODE="8", SLURM_NODEID="3")
    assert "--nproc-per-node=8 " in line
    assert "is_host=0 " in line
    assert line.endswith("launch.threads_per_rank=2 OMP=2\n")


def test_the_users_own_counts_go_before_slurms(echo: str) -> None:
    line = started(echo, "launch.nproc_per_node=3", "launch.threads_per_rank=4", SLURM_GPUS_ON_NODE="8")
    assert "--nproc-per-node=3 " in line
    assert line.endswith("OMP=4\n")
    few = started(echo, "launch.nproc_per_node=3", SLURM_CPUS_ON_NODE="2")
    assert few.endswith("OMP=1\n")


@pytest.mark.parametrize("job", ["1", "1249", "1250", "48000017"])
def test_the_port_is_that_of_the_slurm_launcher_and_another_for_each_restart(job: str) -> None:
    ports = []
    for restart in map(str, range(8)):
        told = bash("port", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restart).stdout.strip()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_LAUNCH_NODE_IPADDR", "n17")
            patch.setenv("SLURM_JOB_ID", job)
            patch.setenv("SLURM_RESTART_COUNT", restart)
            assert compose(["launch=slurm"]).launch.rdzv_endpoint == f"n17:{told}"
        ports.append(int(told))
    assert len(set(ports)) == 8
    assert 20_000 <= min(ports) <= max(ports) < 30_000  # docs/slurm.md


def test_a_wrong_number_of_ranks_is_told(echo: str) -> None:
    result = bash('bash -c "$on_a_node" torchrun "$@"', "launch.nproc_per_node=gpu", path=echo)
    assert result.returncode == 1
    assert result.stderr == "distill: launch.nproc_per_node: got 'gpu'; expected an integer >= 1\n"


def test_without_an_environment_the_script_says_what_to_activate(tmp_path: Path, echo: str) -> None:
    for name in ("bash", "date"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    (tmp_path / "python").unlink()
    result = bash("check_environment", path=str(tmp_path))
    assert result.returncode == 1
    assert "no python in PATH; activate the environment of distill, then call sbatch" in result.stderr
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    result = bash("check_environment", path=str(tmp_path))
    assert f"{tmp_path}/python has no torch and distill" in result.stderr


def test_a_mistake_in_the_settings_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    here = {"path": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(SCRIPTS.parent)}
    result = bash('check_settings "$@"; echo starts', "distill.lrr=1", **here)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("distill: job 1001 failed: distill.lrr: this setting does not exist")
    result = bash('check_settings "$@"; echo starts', "data=imagefolder", "data.root=/My Images (2)", **here)
    assert (result.stdout, result.stderr) == ("starts\n", "")


KILLED = """\
distill: rank 0: the connection to rank 1 was lost
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : n18
  rank      : 1 (local_rank: 0)
  exitcode  : -9 (pid: 99)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 99
srun: error: n18: task 1: Exited with exit code 1
"""
TOLD = """\
[W1] a warning
distill: rank 1: ZeroDivisionError: division by zero
Traceback (most recent call last):
  traceback : Signal 15 (SIGTERM) received by PID 98
distill: rank 0: no boundaries from rank 1
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
ABORTED = KILLED.replace("9 (SIGKILL)", "6 (SIGABRT)")
SILENT = """\
Traceback (most recent call last):
  File "run.py", line 1
torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: The connection to the C10d store has failed.
srun: error: n17: task 0: Exited with exit code 1
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (KILLED, "rank 1 on n18 was killed by signal 9 (SIGKILL), perhaps for want of memory (--mem)"),
        (ABORTED, "rank 0: the connection to rank 1 was lost"),
        (ABORTED.split("\n", 1)[1], "rank 1 on n18 was killed by signal 6 (SIGABRT)"),
        (TOLD, "rank 1: ZeroDivisionError: division by zero"),
        (SILENT, SILENT.splitlines()[2]),
        ("srun: error: nothing\n", "no rank said why; what is above is all there is"),
    ],
)
def test_the_reason_is_what_happened_first_and_not_what_followed(tmp_path: Path, log: str, reason: str) -> None:
    (tmp_path / "log").write_text(log)
    assert bash('reason "$1"', str(tmp_path / "log")).stdout == reason + "\n"


@pytest.mark.parametrize("name", ["distill.sbatch", "sweep.sbatch"])
def test_the_scripts_hold_only_what_every_cluster_has(name: str) -> None:
    options = re.findall(r"^#SBATCH (--[\w-]+)", (SCRIPTS / name).read_text(), re.MULTILINE)
    assert sorted(options) == ["--job-name", "--ntasks-per-node", "--open-mode", "--requeue", "--signal"]
