"""What is delivered is the best state of the student on validation images, and never one that is not a number."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from distill import load_student
from distill.student.evaluate import first_not_finite
from tests.e2e.command import distill, metrics


def test_fine_tuning_that_came_to_nothing_is_not_delivered(tmp_path: Path) -> None:
    """Nor are seven validation images trusted without a word."""
    done = distill(
        "blocks.include=[layer3.2]",
        "plan.cost=flops",
        "finetune.lr=1e30",
        "finetune.epochs=3",
        "data.validation_fraction=0.005",
        "run.dir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation: 7 images to choose the student by, which says its accuracy to within 19 points" in done.stdout
    assert re.search(
        r"finetune: stopped, the loss of epoch \d is not finite; try a lower finetune.lr \(1e\+30\)", done.stdout
    )
    assert re.search(r"is delivered, chosen by 7 validation images \(standard error \d+\.\d points\): ", done.stdout)
    found = metrics(tmp_path / "run")
    student, top1 = found["student"], found["student"]["validation"]["top1"]
    assert student["delivered"] in ("assembled", "recalibrated")
    assert student["top1"] == student[f"top1_{student['delivered']}"]
    assert student["validation"]["images"] == 7
    assert top1[student["delivered"]] == max(value for value in top1.values() if value is not None)
    assert found["finetune"]["epochs"][-1]["loss"] is None
    delivered = load_student(tmp_path / "run")
    assert first_not_finite(delivered) is None
    json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=_refuse)
    assert torch.is_tensor(delivered(torch.zeros(1, 3, 8, 8)))


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
