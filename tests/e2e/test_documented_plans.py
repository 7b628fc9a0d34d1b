"""The commands of docs/plan.md, on the small job."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from tests.documents import fenced
from tests.e2e.command import LIMIT_S, distill, environment


def test_a_plan_of_every_strategy_is_ranked_and_simulated_elsewhere(tmp_path: Path) -> None:
    plan, simulate = (shlex.split(command) for command in fenced("docs/plan.md", "sh"))
    assert plan[:3] == ["python", "-m", "distill"]
    planned = distill(*plan[3:], cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    ranking = next(line for line in planned.stdout.splitlines() if line.startswith("plan: predicted makespans: "))
    assert {"broadcast", "relay", "replicate"} <= set(ranking.split())
    (run,) = (tmp_path / "outputs" / "planned").iterdir()
    arguments = [str(run) if "*" in word else word for word in simulate[1:]]
    shown = subprocess.run(
        [sys.executable, "-m", "distill", *arguments],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    rows = [line.split() for line in shown.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [ranks for ranks in ("1", "2", "4", "8") for _ in range(3)]
    assert float(rows[0][3].removesuffix("x")) == 1.0
    assert all(0 < float(row[3].removesuffix("x")) <= int(row[0]) * 1.01 for row in rows)
