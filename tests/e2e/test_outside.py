"""A job of which all is the user's own: the examples of docs/extending, and an objective that builds on one of them."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from distill import load_student
from tests.documents import example
from tests.e2e.command import distill, metrics
from tests.stripes import COUNT, write_stripes

pytestmark = pytest.mark.jobs

LOSS, OBJECTIVE, DATA, TEACHER, RECIPE = map(example, ("loss", "objective", "data_set", "teacher", "recipe"))
CRITIC = f"""
import torch
from {OBJECTIVE.module} import {OBJECTIVE.attribute}

class Critic({OBJECTIVE.attribute}):
    def __init__(self, **usual):
        super().__init__(**usual)
        self.critic = torch.nn.LazyConv2d(1, 1)

    def forward(self, seen):
        return super().forward(seen) - 0.1 * self.critic(seen.student.taps[self.taps[0]]).mean()

    def own_loss(self, seen):
        student, teacher = (self.critic(outputs.taps[self.taps[0]]) for outputs in (seen.student, seen.teacher))
        return (1 + student).relu().mean() + (1 - teacher).relu().mean()
"""
JOB = (
    "data=custom", f"data.factory={DATA.name}", "data.batch_size=16", "data.num_workers=1",
    "teacher=custom", f"teacher.factory={TEACHER.name}", "teacher.options.width=8", f"distill.loss={LOSS.name}",
    f"student.recipe={RECIPE.name}", "student.options.ratio=0.3", "blocks.include=['7','8.body']", "plan.cost=flops",
    "finetune.objective=own_critic:Critic", "finetune.options.at=['8']",
    "finetune.amp=bf16", "finetune.ema=0.9", "finetune.views=1",
)  # fmt: skip


def test_a_job_of_one_s_own_data_teacher_recipe_loss_and_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (LOSS, OBJECTIVE, DATA, TEACHER, RECIPE):
        one.written_to(tmp_path)
    (tmp_path / "own_critic.py").write_text(CRITIC)
    job = (*JOB, f"data.options.root={write_stripes(tmp_path / 'arrays', 8)}")
    done = distill(*job, "run.dir=run", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    run, found = tmp_path / "run", metrics(tmp_path / "run")
    assert "logits are not kept: the objective sees activations too (8)" in done.stdout
    assert found["finetune"]["computed_in"] == "bf16"
    assert (found["data"]["name"], found["data"]["test_images"]) == ("custom", COUNT["test"])
    card = json.loads((run / "student.json").read_text())
    assert card["classes"] == ["lying", "standing"]
    assert [(block["recipe"], block["options"]) for block in card["blocks"]] == [(RECIPE.name, {"ratio": 0.3})] * 2
    with safe_open(run / "student.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "critic" in name]  # noqa: SIM118
    facts = json.loads((run / "identity.json").read_text())
    for setting, own in {"data.factory": DATA, "teacher.factory": TEACHER, "student.recipe": RECIPE}.items():
        assert facts[f"{setting} (source)"].startswith(f"{own.module}; content ")
    assert facts["finetune.objective (source)"].startswith(f"{OBJECTIVE.module}, own_critic; content ")

    monkeypatch.syspath_prepend(tmp_path)
    factory, recipe = (getattr(import_module(one.module), one.attribute) for one in (TEACHER, RECIPE))
    student = load_student(run, factory=factory, recipes={RECIPE.name: recipe})
    assert student(torch.rand(2, 3, 8, 8)).shape == (2, 2)

    (tmp_path / "elsewhere").mkdir()
    again = distill("run=../run", cwd=tmp_path / "elsewhere")
    assert again.returncode == 0, again.stderr
    assert "epoch 1" not in again.stdout, "nothing is left to do, and all of it is found from there"

    (tmp_path / f"{LOSS.module}.py").write_text(LOSS.source.replace(".mean()", ""))
    refused = distill(*job, "run.dir=other", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"distill: distill.loss: got {LOSS.name!r}; expected a scalar tensor")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "other").exists()
