"""What a run takes from others instead of training it: only what is the same, finished and whole."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.job import run_rank
from distill.reporting import write_report
from tests.e2e.command import SMALL, bits, distill

pytestmark = pytest.mark.jobs

QUICK = ("stage=distill", "plan.cost=flops")
FACTORY = "from distill.teachers.cifar_resnet import cifar_resnet\n\ndef net(num_classes):\n    return {}\n"


@pytest.fixture(autouse=True)
def _undo_what_a_rank_does_to_its_process() -> Iterator[None]:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    close_logs()


def close_logs() -> None:
    logger = logging.getLogger("distill")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.propagate = True


@pytest.fixture
def first(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run in a folder of the test's own, which is the working folder."""
    shutil.copytree(finished[0].parents[1], tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs" / finished[0].relative_to(finished[0].parents[1])


def run(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[Path, str]:
    """Run a job in this process up to its blocks; return its directory and what it printed."""
    status = run_rank([*SMALL, *QUICK, *overrides])
    close_logs()
    printed = capsys.readouterr()
    assert status == 0, printed.err
    place = printed.out.partition("run directory: ")[2].partition(" (attempt")[0]
    return Path(place.replace("\n", "")), printed.out


def name_of(run_dir: Path) -> str:
    return f"{run_dir.parent.name}/{run_dir.name}"


def ledger(run_dir: Path) -> dict[str, Any]:
    lines = map(json.loads, (run_dir / "ledger.jsonl").read_text().splitlines())
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("change", [("finetune.lr=0.5",), ("blocks.granularity=conv",)])
def test_what_computes_the_same_blocks_trains_none(
    first: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, ...]
) -> None:
    second, printed = run(capsys, *change)
    assert second != first
    assert f"teacher: taken from run {name_of(first)}" in printed
    assert f"distill stage: 9 of 9 blocks taken from run {name_of(first)}" in printed
    assert "no block is trained again" in printed
    assert set(bits(second).values()) == set(bits(first).values())
    errors = [json.loads((run / "stages" / "first_weights.json").read_text())["result"] for run in (first, second)]
    begun, again = (sorted(found["relative_errors"].values()) for found in errors)
    assert begun == again, "by which assembling tells what has got worse"
    page = write_report(second).read_text()
    assert f"trained by run {name_of(first)}" in page
    assert f"9 of 9 trained by run {name_of(first)}" in page
    shutil.rmtree(first)
    third, printed = run(capsys, "finetune.lr=0.25")
    assert f"9 of 9 blocks taken from run {name_of(first)}" in printed, "found in the second, named after who trained"
    assert bits(third).keys() == bits(second).keys() or change != ("finetune.lr=0.5",)


def test_other_students_take_the_teacher_alone_and_bits_are_those_of_training(
    first: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    second, printed = run(capsys, "student=separable_x2", "blocks.include=[layer3.2]")
    assert "teacher: taken from" in printed
    assert "blocks taken" not in printed
    assert ledger(second)["layer3.2"]["source"] is None
    weights = (first / "teacher.safetensors").read_bytes()
    assert (second / "teacher.safetensors").read_bytes() == weights
    own, printed = run(capsys, "blocks.include=[layer3.2]", "run.dir=own")
    assert "taken from" not in printed, "a directory of one's own choice is for computing everything"
    assert bits(own)["layer3.2"] == bits(first)["layer3.2"]
    tagged, printed = run(capsys, "blocks.include=[layer3.2]", "run.tag=again")
    assert "taken from" not in printed, "another tag is to be measured"
    assert bits(tagged) == bits(own)


def test_what_is_damaged_or_unfinished_is_trained(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = bits(first)
    (first / "stages" / "distill.json").unlink()
    lines = (first / "ledger.jsonl").read_text().splitlines(keepends=True)
    (first / "ledger.jsonl").write_text("".join(line for line in lines if "layer1.0" not in line))
    content = bytearray((first / "teacher.safetensors").read_bytes())
    content[-1] ^= 1
    (first / "teacher.safetensors").write_bytes(content)
    damaged = first / "blocks" / "09.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    second, printed = run(capsys, "finetune.lr=0.5", "blocks.include=[layer1.0,layer1.1,layer3.2]")
    assert f"teacher: that of run {name_of(first)} is not taken: damaged" in printed
    assert "teacher: training" in printed
    assert "1 of 3 blocks taken" in printed
    assert bits(second) == {name: before[name] for name in ("layer1.0", "layer1.1", "layer3.2")}
    sources = {name: line["source"] for name, line in ledger(second).items()}
    assert sources == {"layer1.0": None, "layer1.1": name_of(first), "layer3.2": None}


def test_a_run_with_a_factory_goes_on_from_any_folder_and_an_edited_one_is_refused(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "zoo.py").write_text(FACTORY.format("cifar_resnet('cifar_resnet20', num_classes=num_classes)"))
    (there / "zoo.py").write_text("raise RuntimeError('of another folder')\n")
    job = (*QUICK, "blocks.include=[layer3.2]", "teacher=custom", "teacher.factory=zoo:net", "run.dir=run")
    started = distill(*job, "stage=teacher", cwd=here)
    assert started.returncode == 0, started.stderr
    onward = distill(f"run={here / 'run'}", "stage=distill", cwd=there)
    assert onward.returncode == 0, onward.stderr
    assert "(attempt 2)" in onward.stdout
    assert bits(here / "run").keys() == {"layer3.2"}
    (here / "zoo.py").write_text(FACTORY.format("cifar_resnet('cifar_resnet32', num_classes=num_classes)"))
    refused = distill(f"run={here / 'run'}", cwd=there)
    assert refused.returncode == 1
    assert "differing: the source of teacher.factory: zoo; content" in refused.stderr
    assert "Traceback" not in refused.stderr
