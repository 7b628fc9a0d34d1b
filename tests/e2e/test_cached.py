"""teacher.cache by the real command: recorded once, also over a stop; the students of a run without a cache."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.documents import fenced
from tests.e2e.command import bits, distill, interrupt_after_first_checkpoint, metrics

pytestmark = pytest.mark.jobs


@pytest.fixture(scope="module")
def job(finished: tuple[Path, str]) -> tuple[str, ...]:
    return (
        f"teacher.weights={finished[0] / 'teacher.safetensors'}",
        "teacher.fit.epochs=0",
        "distill.views=2",
        "distill.steps=80",
        "distill.stop=plateau",
        "distill.check_every=20",
        "finetune.epochs=0",
        "checkpoint.every=10",
        "plan.cost=flops",
    )


@pytest.fixture(scope="module")
def cached(job: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run with a cache in memory, and what it printed."""
    cwd = tmp_path_factory.mktemp("cached")
    result = distill(*job, "teacher.cache=ram", "run.dir=run", cwd=cwd, ranks=2)
    assert result.returncode == 0, result.stderr
    return cwd / "run", result.stdout


def test_a_cached_run_tells_its_price_and_what_it_was(cached: tuple[Path, str]) -> None:
    run_dir, printed = cached
    assert "plan: cached on 2 ranks" in printed
    assert "cache: 0.06 GiB in ram on each host, for 10 boundaries of 1294 images in 2 views as fp32" in printed
    assert "without a cache broadcast" in printed
    assert "cache: recorded in" in printed
    stage = metrics(run_dir)["distill"]
    assert (stage["strategy"], stage["bytes_sent"]) == ("cached", 0)
    assert stage["teacher_passes"] == stage["cache"]["teacher_passes"] == 2 * 21 + 2
    assert stage["cache"]["seconds"] > 0
    assert stage["cache"]["predicted_s"] > 0
    assert stage["cache"]["bytes"] > 60e6
    plan = json.loads((run_dir / "plan.json").read_text())
    assert plan["recording_s"] == stage["cache"]["predicted_s"]
    assert not (run_dir / "cache").exists()
    names = {(event["cat"], event["name"]) for event in json.loads((run_dir / "trace.json").read_text())["traceEvents"]
             if event["ph"] == "X"}  # fmt: skip
    assert {("stage", "stage record"), ("record", "record own share"), ("teacher", "teacher cache")} <= names


def test_the_documented_command_plans_a_cached_run(job: tuple[str, ...], tmp_path: Path) -> None:
    (command,) = (shlex.split(line) for line in fenced("docs/cache.md", "sh"))
    assert command[:3] == ["python", "-m", "distill"]
    planned = distill(*job, *command[3:], "stage=plan", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "plan: cached on 1 rank" in planned.stdout
    assert "cache: 0.03 GiB in ram" in planned.stdout


def test_its_students_are_those_of_a_run_without_a_cache_but_for_rounding(
    job: tuple[str, ...], cached: tuple[Path, str], tmp_path: Path
) -> None:
    plain = distill(*job, "run.dir=run", "stage=distill", cwd=tmp_path, ranks=2)
    assert plain.returncode == 0, plain.stderr
    with_cache, without = (
        {entry["name"]: entry for entry in map(json.loads, (run_dir / "ledger.jsonl").read_text().splitlines())}
        for run_dir in (cached[0], tmp_path / "run")
    )
    assert with_cache.keys() == without.keys()
    for name, entry in without.items():
        assert with_cache[name]["steps"] == entry["steps"]
        for error in ("rel_error_last", "rel_error_held_out"):
            assert with_cache[name][error] == pytest.approx(entry[error], rel=0.02), (name, error)


def test_an_interrupted_run_on_another_world_size_finds_its_file_and_ends_in_the_same_bits(
    job: tuple[str, ...], cached: tuple[Path, str], tmp_path: Path
) -> None:
    interrupt_after_first_checkpoint(*job, "teacher.cache=disk", cwd=tmp_path)
    assert len(list(tmp_path.glob("broken/cache/*/*.rows"))) == 1
    resumed = distill(*job, "teacher.cache=disk", "run.dir=broken", cwd=tmp_path, ranks=1)
    assert resumed.returncode == 0, resumed.stderr
    assert "cache: found complete" in resumed.stdout
    assert "cache: recorded in" not in resumed.stdout
    assert metrics(tmp_path / "broken")["distill"]["teacher_passes"] == 0
    assert bits(tmp_path / "broken") == bits(cached[0])
    assert not (tmp_path / "broken" / "cache").exists(), "it is of no use to a run whose blocks are trained"


def test_runs_with_other_students_share_a_folder_of_recorded_files(job: tuple[str, ...], tmp_path: Path) -> None:
    common = (*job, "teacher.cache=disk", "cache.dir=shared")
    first = distill(*common, "distill.steps=2", "stage=distill", "run.dir=a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "cache: recorded in" in first.stdout
    assert len(list(tmp_path.glob("shared/*/*.rows"))) == 1
    for number, (change, found) in enumerate((("student.rank=1", True), ("distill.views=1", False), ("seed=1", False))):
        planned = distill(*common, change, "stage=plan", f"run.dir=plan{number}", cwd=tmp_path)
        assert planned.returncode == 0, planned.stderr
        assert ("cache: recording 0.0 s" in planned.stdout) is found, change


def test_a_cache_larger_than_allowed_is_refused_with_what_it_takes(job: tuple[str, ...], tmp_path: Path) -> None:
    result = distill(*job, "teacher.cache=ram", "cache.max_gib=0.05", "run.dir=run", cwd=tmp_path, ranks=2)
    assert result.returncode == 1
    assert "cache.max_gib: got 0.05; expected at least 0.07, which 2 x 1294 images with 10 boundaries" in result.stderr
    assert "fewer distill.views, cache.dtype=bf16" in result.stderr
    assert result.stderr.count("cache.max_gib") == 1, "told once"
