"""A job whose data set, block loss and objective are the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.e2e.command import distill, metrics

pytestmark = pytest.mark.jobs

DATA = """
import torch

class Stripes:
    classes = ("lying", "standing")

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.rand(3, 8, 8) / 2
        (image if index % 2 else image.transpose(1, 2))[:, :, ::2] += 0.5
        return image, index % 2

def stripes(train, count=200):
    return Stripes(count if train else 64)
"""
LOSSES = """
import torch
from distill.training.objective import Distillation

def huber(student, target):
    return torch.nn.functional.smooth_l1_loss(student.float(), target.float())

class Critic(Distillation):
    taps = ("layer3",)

    def __init__(self, *, weight, **usual):
        super().__init__(**usual)
        self.weight = weight
        self.critic = torch.nn.LazyConv2d(1, 1)

    def forward(self, seen):
        return super().forward(seen) - self.weight * self.critic(seen.student.taps["layer3"]).mean()

    def own_loss(self, seen):
        student, teacher = (self.critic(outputs.taps["layer3"]) for outputs in (seen.student, seen.teacher))
        return (1 + student).relu().mean() + (1 - teacher).relu().mean()
"""
JOB = (
    "data=custom", "data.factory=own_data:stripes", "+data.options.count=160", "data.batch_size=16",
    "data.num_workers=1", "distill.loss=own_losses:huber", "blocks.include=[layer3.*]", "plan.cost=flops",
    "finetune.objective=own_losses:Critic", "+finetune.options.weight=0.1", "run.dir=run",
)  # fmt: skip


def test_a_job_of_one_s_own_data_loss_and_objective(tmp_path: Path) -> None:
    (tmp_path / "own_data.py").write_text(DATA)
    (tmp_path / "own_losses.py").write_text(LOSSES)
    done = distill(*JOB, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    run, found = tmp_path / "run", metrics(tmp_path / "run")
    assert (found["data"]["name"], found["data"]["test_images"]) == ("custom", 64)
    assert json.loads((run / "student.json").read_text())["classes"] == ["lying", "standing"]
    with safe_open(run / "student.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "critic" in name]  # noqa: SIM118
    facts = json.loads((run / "identity.json").read_text())
    assert facts["data.factory (source)"].startswith("own_data; content ")
    assert facts["distill.loss (source)"] == facts["finetune.objective (source)"]

    (tmp_path / "elsewhere").mkdir()
    again = distill("run=../run", cwd=tmp_path / "elsewhere")
    assert again.returncode == 0, again.stderr
    assert "epoch 1" not in again.stdout, "nothing is left to do, and all of it is found from there"

    spoilt = LOSSES.replace('("layer3",)', '("layer4",)').replace(".float())", ".float(), reduction='none')")
    (tmp_path / "own_losses.py").write_text(spoilt)
    refused = distill(*JOB[:-1], "run.dir=other", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("distill: distill.loss: got 'own_losses:huber'; expected a scalar tensor")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "other").exists()
