"""The refine stage in jobs of this process: a break between two blocks changes nothing, and what is refined counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distill
from distill.job import refine
from distill.training.finetune import Epoch, fit

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(600)]
JOB = (
    "refine=progressive", "refine.order=bottom_up", "refine.steps=3", "distill.steps=0", "finetune.epochs=1",
    "assemble.batchnorm_batches=0", "assemble.refit_images=0", "plan.cost=flops", "deploy.programs=[]",
    "data.validation_fraction=0.25", "launch.threads_per_rank=1",
)  # fmt: skip


class Three(nn.Module):
    """A stem, which stays, and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for width in (3, 8, 8)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


def images(seed: int) -> TensorDataset:
    torch.manual_seed(seed)
    return TensorDataset(torch.rand(64, 3, 8, 8), torch.arange(64) % 4)


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    torch.manual_seed(0)
    made = distill.compress(Three(), images(1), images(2), overrides=(*JOB, *overrides), run_dir=folder)
    return dict(made.metrics)


def losses(metrics: dict[str, Any]) -> dict[str, list[float]]:
    return {name: [epoch["loss"] for epoch in course] for name, course in metrics["refine"]["courses"].items()}


def test_a_break_between_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    assert [*losses(whole)] == ["first.0", "second.0"]
    trained: list[str] = []

    def broken_off(*args: Any, name: str, **usual: Any) -> list[Epoch]:
        if trained:
            raise KeyboardInterrupt
        trained.append(name)
        return fit(*args, name=name, **usual)

    with monkeypatch.context() as patch:
        patch.setattr(refine, "fit", broken_off)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken")
    again = run(tmp_path / "broken")
    assert losses(again) == losses(whole)
    assert again["refine"]["validation_top1"] == whole["refine"]["validation_top1"]
    assert not list((tmp_path / "broken" / "checkpoints").glob("*"))
    kept = whole["refine"]["kept"]
    assert kept == ("refined" in whole["student"]["validation"]["top1"])
    assert kept == (whole["student"]["top1_refined"] is not None)
    used = json.loads((tmp_path / "whole" / "stages" / "finetune.json").read_text())
    assert ("refined.safetensors" in json.dumps(used)) == kept
    assert again["finetune"]["epochs"][0]["loss"] == whole["finetune"]["epochs"][0]["loss"]


def test_a_loss_that_is_not_finite_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "refine.lr=1e30", "finetune.epochs=0")
    assert found["refine"]["kept"] is False
    assert [*losses(found)] == ["first.0"], "what follows would get nothing but that"
    assert losses(found)["first.0"][-1] is None
    assert found["student"]["delivered"] == "assembled"
