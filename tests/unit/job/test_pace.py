"""Which way of computing steps is chosen, and that all of them train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.config.choices import TrainingAmp
from distill.data import Batch
from distill.job.pace import Pace, choice, possible
from distill.recipes.separable import SeparableConv2d
from distill.training.objective import Distillation, TeacherHere
from distill.training.pace import Way, step_seconds

PLAIN, BF16, BOTH = Pace(), Pace(bf16=True), Pace(bf16=True, one_kernel=True)
CPU = torch.device("cpu")


def test_the_fastest_is_chosen_where_it_pays() -> None:
    assert choice([PLAIN, BF16, BOTH], {PLAIN: 1.0, BF16: 0.95, BOTH: 0.7}) == BOTH
    assert choice([PLAIN, BF16], {PLAIN: 1.0, BF16: 0.95}) == PLAIN
    assert choice([PLAIN, BF16], {BF16: 0.95}) == BF16, "the plain one cannot be computed"
    assert choice([PLAIN, BF16], {}) == PLAIN


def test_the_configuration_says_what_is_possible() -> None:
    assert possible(TrainingAmp.off, factored=False) == [PLAIN]
    assert possible(TrainingAmp.bf16, factored=True) == [BF16, BOTH]
    assert possible(TrainingAmp.auto, factored=True) == [PLAIN, BF16, Pace(one_kernel=True), BOTH]
    assert [str(pace) for pace in (PLAIN, BOTH)] == ["fp32", "bf16, factors as one kernel"]


def test_steps_are_timed_in_every_way_that_can_be_gone(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(
        SeparableConv2d(nn.Conv2d(3, 4, 3, padding=1), 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
    )
    weights = {name: tensor.clone() for name, tensor in student.named_parameters()}
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 2)).eval()
    batch = Batch(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1]))
    seen: set[torch.dtype] = set()
    teacher.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))

    def refused() -> object:
        raise RuntimeError("not implemented for 'BFloat16'\nat some place")

    source = TeacherHere(teacher, ())
    ways = {str(pace): Way(pace.computing(student, (), CPU), pace.outputs(source)) for pace in (PLAIN, BF16, BOTH)}
    ways["another"] = Way(refused, source)  # type: ignore[arg-type]
    found = step_seconds(student, Distillation(temperature=4.0, soft_weight=0.9), batch, ways)
    assert found.keys() <= {str(pace) for pace in (PLAIN, BF16, BOTH)}
    assert found
    assert seen == {torch.float32, torch.bfloat16}
    assert caplog.text.count("it cannot be computed in another here (not implemented for 'BFloat16')") == 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in student.named_parameters())
