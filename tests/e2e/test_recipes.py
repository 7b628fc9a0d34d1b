"""A job with another recipe for some blocks, one of them from outside, whose first weights ask for statistics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill import load_student
from distill.errors import DistillError
from tests.e2e.command import distill

pytestmark = pytest.mark.jobs

OUTSIDE = """
from dataclasses import dataclass

import torch

from distill.recipes import Separable, option


@dataclass(frozen=True, kw_only=True)
class Centred(Separable):
    rank: int = option(1, "depthwise filters")
    seen: str = option("inputs", "what it looks at")

    def wants(self, changes):
        return self.paths(changes)

    def initialize(self, replacement, conv, generator, flow=None):
        super().initialize(replacement, conv, generator)
        width = conv.weight[0].numel()
        assert flow.covariance.shape == (width, width)
        assert flow.scale.shape == (len(conv.weight),)
        torch.linalg.cholesky(flow.covariance)
"""


def test_blocks_have_the_recipes_that_patterns_give_them(finished: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    recipes = "{layer1.*: {recipe: keep}, layer3.0: {recipe: one_conv}, layer3.2: {recipe: outside:Centred}}"
    result = distill(
        f"teacher.weights={finished[0] / 'teacher.safetensors'}", "teacher.fit.epochs=0", "plan.cost=flops",
        "run.dir=run", "student.options.rank=1", f"student.per_block={recipes}",
        "finetune.objective=entropy_temperature", "finetune.options.k=0.5", "finetune.fused_views=2",
        "finetune.feature_weight=0.5", cwd=tmp_path, ranks=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    card = json.loads((tmp_path / "run" / "student.json").read_text())
    made = [(block["recipe"], block["changes"].get("module")) for block in card["blocks"]]
    assert made == [("separable", None)] * 3 + [
        ("one_conv", "layer3.0"),
        ("separable", None),
        ("outside:Centred", None),
    ]
    assert card["blocks"][0]["options"]["rank"] == 1
    assert "statistics: of the inputs of 10 layers, over 8 batches" in result.stdout
    assert "beside the logits, what leaves layer2.0, layer2.1, layer2.2, layer3.0, layer3.1, layer3.2" in result.stdout
    with pytest.raises(DistillError, match="outside:Centred"):
        load_student(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["student.per_block"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("student.options.rnak=3", r"student.options.rnak: got 3; expected an option of the recipe separable: 'rank'"),
        ("student.options.rank=two", r"student.options.rank: got 'two'; expected int \(depthwise filters"),
        ("student.recipe=seperable", r"student.recipe: got 'seperable'.*separable"),
        ("student.per_block={layer9.*: {recipe: keep}}", r"student.per_block: got 'layer9.\*'.*a block"),
        ("student.per_block={layer1.*: keep}", r"student.per_block.layer1.\*: got 'keep'; expected a mapping"),
        ("student.recipe=os:getcwd", r"student.recipe: got 'os:getcwd'; expected a class derived from"),
        ("student.recipe=keep", r"student.recipe=keep replaces"),
    ],
)
def test_what_cannot_be_made_of_blocks_is_refused_by_its_setting(tmp_path: Path, setting: str, words: str) -> None:
    result = distill(setting, "stage=plan", cwd=tmp_path)
    assert result.returncode != 0
    assert re.search(words, result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def test_a_stream_becomes_narrower_in_all_of_its_blocks(finished: tuple[Path, str], tmp_path: Path) -> None:
    command = [
        f"teacher.weights={finished[0] / 'teacher.safetensors'}", "teacher.fit.epochs=0", "plan.cost=flops",
        "run.dir=run", "student=stream", "student.align=8", "finetune.epochs=0",
    ]  # fmt: skip
    result = distill(*command, cwd=tmp_path, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "run"
    card, metrics = (json.loads((run / name).read_text()) for name in ("student.json", "metrics.json"))
    assert {block["recipe"] for block in card["blocks"]} == {"stream"}
    assert 0.4 < metrics["student"]["params"] / metrics["teacher"]["params"] < 0.6
    assert len(metrics["blocks"]) == len(card["blocks"]) == 11
    assert all(0 <= block["rel_error_start"] < 1 for block in metrics["blocks"])
    student = load_student(run)
    assert [student.layer1[0].conv2.out_channels, student.layer3[0].conv2.out_channels] == [8, 32]
    assert student.linear.in_features == 32
    assert "channels of 5 streams chosen by the inputs of 10 of 10 layers" in result.stdout
    units = [block["changes"]["units"] for block in card["blocks"]]
    again = distill(*command, cwd=tmp_path)
    assert "channels of" not in again.stdout
    assert [block["changes"]["units"] for block in json.loads((run / "student.json").read_text())["blocks"]] == units


def test_a_student_without_one_gradient_step_is_the_same_from_any_ranks_and_the_least_that_training_ends_with(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """First weights are made side by side; put together, they are most of the teacher's accuracy. Blocks that training
    ruins go back to them."""
    states = []
    for ranks, steps in ((1, 0), (2, 0), (2, 3)):
        result = distill(
            f"teacher.weights={finished[0] / 'teacher.safetensors'}", "teacher.fit.epochs=0", f"distill.steps={steps}",
            "distill.lr=1.0", "finetune.epochs=0", "plan.cost=flops", "assemble.batchnorm_batches=8",
            f"run.dir=run{ranks}{steps}", cwd=tmp_path, ranks=ranks,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        assert "first weights of 9 blocks" in result.stdout
        run = tmp_path / f"run{ranks}{steps}"
        names = ["student.safetensors", *(f"first/{number:02d}.safetensors" for number in range(1, 10))]
        states.append([load_file(run / name) for name in names])
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["student"]["top1"] > metrics["student"]["top1_assembled"] - 10
        assert metrics["student"]["top1"] > 0.6 * metrics["teacher"]["top1"]
        for block in metrics["blocks"]:
            assert (block["recipe"], block["steps"]) == ("separable", steps)
            assert 0 < block["rel_error_start"] < 1
    assert (result.stdout + result.stderr).count("it goes back to its first weights") == 9
    for one, *others in zip(*states, strict=True):
        assert all(one.keys() == other.keys() for other in others)
        assert all(torch.equal(one[name], other[name]) for name in one for other in others)
