"""The job by every strategy that promises the same students, and what it says of its plan."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from distill.storage.run_directory import RunDirectory
from tests.e2e.command import bits, distill

pytestmark = pytest.mark.jobs

STRATEGIES = {
    "relay": ("plan.strategy=relay",),
    "layerwise": ("plan.strategy=layerwise",),
    "two teacher ranks": ("plan.teacher_ranks=2",),
}


def trained_by(run_dir: Path, cwd: Path, *plan: str) -> subprocess.CompletedProcess[str]:
    """Train the students of a finished run's teacher again in cwd/run, on two ranks by another plan."""
    teacher = (f"teacher.weights={run_dir / 'teacher.safetensors'}", "teacher.fit.epochs=0")
    result = distill(*teacher, "plan.cost=flops", "run.dir=run", *plan, cwd=cwd, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_students_are_bitwise_those_of_a_broadcast(finished: tuple[Path, str], tmp_path: Path, name: str) -> None:
    result = trained_by(finished[0], tmp_path, "stage=distill", *STRATEGIES[name])
    assert bits(tmp_path / "run") == bits(finished[0])
    assert RunDirectory(tmp_path / "run").result("distill")["teaching_ranks"] == [0, 1]
    if name == "two teacher ranks":
        assert "plan: broadcast with 2 teacher ranks on 2 ranks" in result.stdout
        assert "rank 1: teacher and students, predicted" in result.stdout


def test_two_ranks_share_the_batches_of_one_block_where_they_may(finished: tuple[Path, str], tmp_path: Path) -> None:
    shared = ("blocks.include=[layer3.2]", "plan.strategy=relay", "plan.groups=true", "finetune.epochs=0")
    result = trained_by(finished[0], tmp_path, *shared)
    assert "plan: relay in groups on 2 ranks" in result.stdout
    assert "rank 1: teacher and students with rank 0, predicted" in result.stdout
    assert RunDirectory(tmp_path / "run").result("distill")["groups"] == [[0, 1]]
    assert bits(tmp_path / "run").keys() == {"layer3.2"}
    assert "ranks that share batches" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["plan.groups"] is True
