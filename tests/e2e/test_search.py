"""Recipes chosen under a budget: one job, any number of ranks, again, and several budgets at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill import load_student
from distill.storage.run_directory import RunDirectory
from tests.e2e.command import distill, metrics

pytestmark = pytest.mark.jobs

FEW = "search.candidates=[{recipe: skip},{recipe: separable, rank: 1},{recipe: lowrank, form: spatial, ratio: 0.25}]"
STREAMS = "search.candidates=[{recipe: stream, ratio: 0.5},{recipe: separable, rank: 1, blocks: layer2.*}]"
SEARCH = (
    FEW, "blocks.include=[layer2.*,layer3.*,linear]", "search.images=64", "search.judged=2", "plan.cost=flops",
    "distill.steps=0", "finetune.epochs=0",
)  # fmt: skip


def teacher_of(run_dir: Path) -> tuple[str, str]:
    return f"teacher.weights={run_dir / 'teacher.safetensors'}", "teacher.fit.epochs=0"


def weights_in(run_dir: Path, folder: str = "candidates") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / folder).iterdir())}


def test_the_student_is_within_the_budget_and_the_search_is_not_done_again(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    budgets = "search.budget.params=0.7", "search.budget.flops=0.9", "search.budget.memory=0.85"
    job = (*teacher_of(finished[0]), *SEARCH, STREAMS, *budgets, "run.dir=run")
    result = distill(*job, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = metrics(tmp_path / "run")
    (budget,) = found["search"]["budgets"]
    assert budget["budget"]["params"]["asked"] == 0.7
    assert budget["predicted"]["params"] == budget["measured"]["params"] == found["student"]["params"]
    assert found["student"]["params"] <= 0.7 * found["teacher"]["params"]
    assert found["student"]["flops"] == budget["predicted"]["flops"] <= 0.9 * found["teacher"]["flops"]
    assert budget["measured"]["memory"] == budget["predicted"]["memory"] <= budget["budget"]["memory"]["limit"]
    assert list(budget["chosen"]) == ["layer2.0", "layer2.1", "layer2.2", "layer3.0", "layer3.1", "layer3.2", "linear"]
    assert budget["chosen"]["layer3.0"] == budget["chosen"]["linear"] != "keep"  # a stream runs through all of them
    assert len(found["search"]["candidates"]) == 3 + 3
    assert "loses most" in result.stdout
    assert sum(one.numel() for one in load_student(tmp_path / "run").parameters()) == found["student"]["params"]
    again = distill(*job, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "search: complete since an earlier attempt (layer2.0 " in again.stdout
    assert "scored on" not in again.stdout


def test_two_ranks_score_and_choose_bitwise_what_one_does(finished: tuple[Path, str], tmp_path: Path) -> None:
    job = (*teacher_of(finished[0]), *SEARCH, STREAMS, "search.budget.bytes=900kB", "search.steps=4", "stage=plan")
    for ranks in (1, 2):
        result = distill(*job, f"run.dir=run{ranks}", cwd=tmp_path, ranks=ranks)
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = (RunDirectory(tmp_path / f"run{ranks}") for ranks in (1, 2))
    assert one.result("candidates")["scores"] == two.result("candidates")["scores"]
    assert {**one.result("search"), "seconds": 0} == {**two.result("search"), "seconds": 0}
    assert weights_in(one.path) == weights_in(two.path)
    pool = one.result("search")["pool"]
    assert any(found["trained_steps"] for found in pool)
    assert all(found["divergence"] < found["before"]["divergence"] for found in pool if found["trained_steps"])
    assert any(found["dropped"] for found in pool)
    (one.path / "stages" / "first_weights.json").write_text("{")  # trained ones, which the search alone can make
    damaged = distill(*job, "run.dir=run1", cwd=tmp_path)
    assert damaged.returncode == 0, damaged.stdout + damaged.stderr
    assert "stage first_weights is done again" in damaged.stdout + damaged.stderr
    assert "scored on" not in damaged.stdout
    assert "halving_" not in damaged.stdout
    assert {**one.result("search"), "seconds": 0} == {**two.result("search"), "seconds": 0}
    assert weights_in(one.path, "first") == weights_in(two.path, "first")


def test_several_budgets_are_a_job_each_and_candidates_are_scored_once(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    job = (*teacher_of(finished[0]), *SEARCH)
    result = distill(*job, "search.sweep=params", "search.budgets=[0.4,150k]", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("scored on") == 1
    assert "candidates: taken from run" in result.stdout
    sweep = json.loads(next((tmp_path / "outputs" / "sweeps").glob("*/sweep.json")).read_text())
    params = [metrics(Path(one["run_dir"]))["student"]["params"] for one in sweep["jobs"]]
    assert params[0] <= 0.4 * 269_722 < params[1] <= 150_000


def test_several_budgets_are_no_job_of_torchrun_or_of_one_rank(tmp_path: Path) -> None:
    result = distill("--multirun", "search.sweep=params", "search.budgets=[0.4]", cwd=tmp_path)
    assert result.returncode == 1
    assert "search.budgets: got [0.4]; expected none in one job" in result.stderr


def test_latency_is_one_more_amount(finished: tuple[Path, str], tmp_path: Path) -> None:
    timed = ("search.budget.latency=1s", "deploy.runtime=onnxruntime", "deploy.batch=1", "stage=plan", "run.dir=run")
    few = ("search.candidates=[{recipe: separable, rank: 1}]", "blocks.include=[layer3.*]", "search.budget.params=0.9")
    result = distill(*teacher_of(finished[0]), *SEARCH, *few, *timed, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "latency: 3 candidates timed in onnxruntime, batch 1" in result.stdout
    found = RunDirectory(tmp_path / "run").result("search")
    assert 0 < found["predicted"]["latency"] <= found["budget"]["latency"]["limit"] == 1000
    assert all("latency" in one for one in found["pool"])
