"""The commands of docs/plan.md, on the small job."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import fenced
from tests.e2e.command import LIMIT_S, distill, environment

pytestmark = pytest.mark.jobs

PLAN, SIMULATE, IMAGINE = (shlex.split(command) for command in fenced("docs/plan.md", "sh"))


def shown_by(arguments: list[str], cwd: Path) -> list[str]:
    """Run `distill` and return the lines it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "distill", *arguments],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def rows_of(lines: list[str]) -> list[list[str]]:
    """The lines of the table below its two headings, as words."""
    title = next(number for number, line in enumerate(lines) if line.startswith("simulated"))
    return [line.split() for line in lines[title + 2 :] if line[:6].strip().isdecimal()]


def test_a_plan_of_every_strategy_is_ranked_and_simulated_elsewhere(tmp_path: Path) -> None:
    plan, simulate = PLAN, SIMULATE
    assert plan[:3] == ["python", "-m", "distill"]
    planned = distill(*plan[3:], cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    ranking = next(line for line in planned.stdout.splitlines() if line.startswith("plan: predicted makespans: "))
    assert {"broadcast", "relay", "replicate"} <= set(ranking.split())
    (run,) = (tmp_path / "outputs" / "planned").iterdir()
    arguments = [str(run) if "*" in word else word for word in simulate[1:]]
    rows = rows_of(shown_by(arguments, tmp_path))
    assert [row[0] for row in rows] == [ranks for ranks in ("1", "2", "4", "8") for _ in range(3)]
    assert float(rows[0][3].removesuffix("x")) == 1.0
    assert all(0 < float(row[3].removesuffix("x")) <= int(row[0]) * 1.01 for row in rows)


def test_a_job_that_never_ran_is_simulated_on_a_described_cluster_and_drawn(tmp_path: Path) -> None:
    lines = shown_by(IMAGINE[1:], tmp_path)
    assert lines[0] == "DGX H100, H100 SXM 80 GB: described from data sheets, not measured"
    rows = rows_of(lines)
    assert {row[0] for row in rows} == {"4", "8", "64"}
    assert sum(row[-1] == "fastest" for row in rows) == 3
    assert all(0 < float(row[3].removesuffix("x")) <= int(row[0]) * 1.01 for row in rows)
    assert (tmp_path / "efficiency.svg").read_text().startswith("<svg")
    assert not (tmp_path / "outputs").exists()
