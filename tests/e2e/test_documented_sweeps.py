"""The commands of docs/sweeps.md: listed jobs are listed, sweeps make jobs that compose, one sweep is run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distill.launch.multirun import prepare
from distill.launch.sweep import compose_master, hydra_ready, read_sweep
from tests.documents import fenced
from tests.e2e.command import distill, environment

pytestmark = pytest.mark.jobs

PAGE = "docs/sweeps.md"
COMMANDS = [shlex.split(line, comments=True) for block in fenced(PAGE, "sh") for line in block.splitlines()]
SWEEPS = [command[4:] for command in COMMANDS if command[1:4] == ["-m", "distill", "--multirun"]]
OTHERS = [
    command[1:]
    for command in COMMANDS
    if command[1:3] == ["-m", "distill"] and command[4:] and "--multirun" not in command
]


def test_every_command_of_the_page_is_tried_here() -> None:
    assert len(SWEEPS) >= 4
    assert len(OTHERS) >= 2
    others = [command for command in COMMANDS if command[4:] not in SWEEPS and command[1:] not in OTHERS]
    assert [command[:2] for command in others] == [["pip", "install"]]


@pytest.mark.parametrize("overrides", SWEEPS, ids=" ".join)
def test_the_sweep_makes_jobs_that_compose(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if any("submitit" in override for override in overrides):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    with hydra_ready() as ready:
        compose_master(ready, overrides)
    jobs = prepare(read_sweep(overrides))
    assert len(jobs) >= 2
    assert {job.status for job in jobs} == {"waiting"}


@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_the_command_prints_what_it_is_shown_for(command: list[str], tmp_path: Path) -> None:
    if any("submitit" in word for word in command):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "student.rank=4 finetune.epochs=2\n" in done.stdout or "max_num_timeout: 0" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_over_ranks_leaves_the_folders_that_the_page_names(tmp_path: Path) -> None:
    [overrides] = [overrides for overrides in SWEEPS if "run.name=ranks" in overrides]
    small = ("blocks.include=[layer3.2]", "finetune.epochs=0", "plan.cost=flops")
    result = distill("--multirun", *small, *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "outputs" / "ranks").iterdir())
    assert [re.sub("^[0-9a-f]{16}", "", name) for name in names] == [
        "-launch.nproc_per_node-1",
        "-launch.nproc_per_node-2",
    ]
    assert len({name[:16] for name in names}) == 1, "they compute the same"
    shown = next(line for block in fenced(PAGE, "sh") for line in block.splitlines() if "run.name=ranks" in line)
    assert f"outputs/ranks/<fingerprint>{names[0][16:]}" in shown
