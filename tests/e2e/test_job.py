"""The main job by its real command: delivered, repeated, interrupted and resumed, started by torchrun."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distill as package
from distill.observability.energy.joules import describe, summarize
from distill.student.evaluate import count_hits
from tests.e2e.command import (
    FINISHED,
    LIMIT_S,
    SMALL,
    bits,
    distill,
    environment,
    interrupt_after_first_checkpoint,
    metrics,
    torchrun,
)
from tests.opened import opened

FILES = (
    "resolved.yaml",
    "plan.json",
    "costs.json",
    "ledger.jsonl",
    "teacher.safetensors",
    "student.safetensors",
    "student.json",
    "metrics.json",
    "report.html",
    "logs/rank0.log",
    "logs/rank1.log",
    "metrics/rank0.jsonl",
    "metrics/rank1.jsonl",
    "traces/rank0.1.json",
    "traces/rank1.1.json",
    "trace.json",
)


def test_a_run_leaves_every_promised_file(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    assert [name for name in FILES if not (run_dir / name).is_file()] == []
    assert not list((run_dir / "checkpoints").glob("*")), "checkpoints of finished work are removed"


def test_the_output_tells_plan_result_and_where_things_are(finished: tuple[Path, str]) -> None:
    run_dir, printed = finished
    for words in ("plan: broadcast on 2 ranks", "predicted makespan", "teacher against student", "top-1"):
        assert words in printed
    assert f"student: {run_dir}/student.safetensors" in printed
    assert f"report:  {run_dir}/report.html" in printed


def test_energy_is_measured_or_the_reason_is_told_and_nothing_is_zero(finished: tuple[Path, str]) -> None:
    run_dir, printed = finished
    energy = metrics(run_dir)["energy"]
    stages = ["teacher", "first_weights", "plan", "distill", "assemble", "refine", "finetune", "evaluate"]
    assert [*energy["stages"]] == stages
    assert [*summarize(run_dir)["stages"]][-1] == "deliver", "the files go on after metrics.json is written"
    assert energy["images"] == 4 * 64
    measured = [stage["joules"] for stage in energy["stages"].values()]
    assert all(joules is None or joules > 0 for joules in measured)
    assert energy["not_measured"] or None not in measured
    last = printed.splitlines()[-1]
    assert last == describe(summarize(run_dir))
    assert last.startswith("energy: not measured (") == (set(measured) == {None})


def test_metrics_have_the_names_that_others_rely_on(finished: tuple[Path, str]) -> None:
    found = metrics(finished[0])
    for section, names in {
        "teacher": ("top1", "top5", "params", "flops", "bytes", "latency_ms_batch1", "latency_ms_batch64"),
        "student": ("top1", "top5", "top1_assembled", "top1_recalibrated", "params", "flops", "bytes"),
        "distill": ("seconds", "makespan_predicted_s", "images_per_second", "world_size", "strategy", "idle_share"),
    }.items():
        assert [name for name in names if name not in found[section]] == []
    assert found["distill"]["world_size"] == 2
    assert len(found["distill"]["idle_share"]) == 2
    assert len(found["blocks"]) == 9
    for block in found["blocks"]:
        assert block.keys() >= {"name", "rank", "steps", "rel_error_first", "rel_error_last", "sha256", "seconds"}
        assert block["steps"] == 4
    assert {block["rank"] for block in found["blocks"]} == {0, 1}
    assert found["student"]["params"] < 0.3 * found["teacher"]["params"]
    student, validation = found["student"], found["student"]["validation"]
    assert student["top1"] == student[f"top1_{student['delivered']}"]
    refined = ["refined"] if found["refine"]["kept"] else []
    assert [*validation["top1"]] == ["assembled", "recalibrated", *refined, "finetuned"]
    assert found["refine"]["courses"]["all blocks"][-1]["steps"] == 2
    assert validation["top1"][student["delivered"]] == max(validation["top1"].values())
    assert validation["images"] == found["data"]["validation_images"]
    assert validation["standard_error"] > 0
    answers = found["answers"]
    for side in ("teacher", "student"):
        assert 100 * answers[f"{side}_right"] / answers["images"] == found[side]["top1"]
        assert sum(answers["classes"][side]) == answers[f"{side}_right"]
    assert sum(answers["classes"]["images"]) == answers["images"] == found["data"]["test_images"]
    assert answers["alike"] >= answers["alike_where_teacher_right"] > 0
    assert found["finetune"]["kept_epoch"] == 1
    assert found["environment"]["threads"] == 1


def test_the_student_loads_in_two_lines_and_scores_as_reported(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    student = package.load_student(run_dir / "student.safetensors")
    with opened(image_size=8, mean=[0.5] * 3, std=[0.5] * 3) as dataset:
        hits = count_hits(student, dataset.test_batches(100))
    assert hits.images == dataset.num_test
    assert abs(hits.percent()["top1"] - metrics(run_dir)["student"]["top1"]) < 100 / hits.images


@pytest.mark.parametrize("plan", [(), ("plan.strategy=relay",)])
def test_the_same_command_again_trains_nothing_and_prints_the_result_again(
    finished: tuple[Path, str], plan: tuple[str, ...]
) -> None:
    run_dir, _ = finished
    before = {name: (run_dir / name).stat().st_mtime_ns for name in ("student.safetensors", "ledger.jsonl")}
    again = distill(*FINISHED, *plan, cwd=run_dir.parents[2], ranks=1)
    assert again.returncode == 0, again.stderr
    assert "distill stage: complete since an earlier attempt; no block is trained again\n" in again.stdout
    assert "teacher against student" in again.stdout
    assert "epoch" not in again.stdout
    assert {name: (run_dir / name).stat().st_mtime_ns for name in before} == before


def test_an_interrupted_run_goes_on_with_another_world_size_to_the_same_bits(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    job = (
        f"teacher.weights={finished[0] / 'teacher.safetensors'}",
        "teacher.fit.epochs=0",
        "distill.steps=150",
        "finetune.epochs=0",
        "checkpoint.every=10",
        "plan.cost=flops",
    )
    whole = distill(*job, "run.dir=whole", cwd=tmp_path, ranks=1)
    assert whole.returncode == 0, whole.stderr

    def meanwhile() -> None:
        second = distill(*job, "run.dir=broken", cwd=tmp_path, ranks=1)
        assert second.returncode == 1
        assert "run.dir: got '" in second.stderr
        assert "expected a folder in which no other job works: process " in second.stderr
        assert "Traceback" not in second.stderr
        command = [sys.executable, "-m", "distill", "report", "broken"]
        subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=LIMIT_S)

    interrupt_after_first_checkpoint(*job, cwd=tmp_path, meanwhile=meanwhile)
    resumed = distill(*job, "run.dir=broken", cwd=tmp_path, ranks=1)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(tmp_path / "broken")["distill"]["resumed"]
    assert bits(tmp_path / "broken") == bits(tmp_path / "whole")


def test_torchrun_starts_the_same_job_in_one_run_directory_whatever_the_clock(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    weights = f"teacher.weights={finished[0] / 'teacher.safetensors'}"
    result = torchrun(
        weights, "teacher.fit.epochs=0", "finetune.epochs=0", "run.dir=runs/${now:%H-%M-%S-%f}", cwd=tmp_path, ranks=2
    )
    assert result.returncode == 0, result.stderr
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 1
    assert bits(runs[0]) == bits(finished[0]), "torchrun and python -m distill train the same blocks"


def test_two_launchers_meet_as_two_nodes_in_one_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    job = (
        f"teacher.weights={finished[0] / 'teacher.safetensors'}",
        "teacher.fit.epochs=0",
        "run.dir=run",
        "launch.nnodes=2",
        f"launch.rdzv_endpoint={endpoint}",
    )
    command = [sys.executable, "-m", "distill", *SMALL, *job]
    nodes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=LIMIT_S)
        assert node.returncode == 0, errors
    assert metrics(tmp_path / "run")["distill"]["world_size"] == 2
    assert bits(tmp_path / "run") == bits(finished[0])


def test_more_ranks_than_blocks_and_where_weights_were_found_are_told(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    state = {f"module.{key}": tensor for key, tensor in load_file(finished[0] / "teacher.safetensors").items()}
    torch.save({"state_dict": state, "args": argparse.Namespace()}, tmp_path / "best.pt")
    result = distill(
        "teacher.weights=best.pt",
        "teacher.fit.epochs=0",
        "finetune.epochs=0",
        "blocks.include=[layer3.2]",
        "plan.teacher_ranks=1",
        "run.dir=run",
        cwd=tmp_path,
        ranks=3,
    )
    assert result.returncode == 0, result.stderr
    assert "more ranks than blocks to train" in result.stdout
    assert result.stdout.count(f"under state_dict > module.* in {tmp_path / 'best.pt'}\n") == 1
    assert [block["name"] for block in metrics(tmp_path / "run")["blocks"]] == ["layer3.2"]
