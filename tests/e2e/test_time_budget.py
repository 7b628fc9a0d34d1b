"""budget.seconds by the real command: lengths follow from it, and what was decided once is done again."""

import shutil
from pathlib import Path

import pytest

from distill.storage.files import file_digest, read_json
from tests.e2e.command import distill, metrics

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(600)]

BUDGET_S = 160.0
JOB = ("distill.steps=200", "finetune.epochs=2", f"budget.seconds={BUDGET_S:g}", "run.dir=run")


def test_a_command_takes_about_its_budget_and_again_the_same_steps(tmp_path: Path) -> None:
    done = distill(*JOB, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    told = metrics(run)["seconds"]
    # generous: other work on the machine changes from one second to the next
    assert 0.5 < told["device_seconds"] / BUDGET_S < 1.6
    assert told["budget"] == BUDGET_S
    assert set(told["stages"]) >= {"teacher", "first_weights", "plan", "assemble", "finetune", "evaluate", "deliver"}
    before = file_digest(run / "finetuned.safetensors")
    course = read_json(run / "stages/finetune.json")["result"]["epochs"]

    (run / "finetuned.safetensors").unlink()
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    again = distill(*JOB, cwd=tmp_path, ranks=2)
    assert again.returncode == 0, again.stderr
    assert [one["steps"] for one in read_json(run / "stages/finetune.json")["result"]["epochs"]] == [
        one["steps"] for one in course
    ]
    assert file_digest(run / "finetuned.safetensors") == before
