"""A teacher's logits over several augmentations of an image."""

from __future__ import annotations

import math

import torch
from torch import nn

from distill.data import Batch
from distill.training.fused_views import FusedViews, fused
from distill.training.losses import soft_target_loss
from distill.training.objective import Address, TeacherHere


def test_fused_logits_give_the_mean_of_the_softened_predictions() -> None:
    one, other = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    logits = fused([one, other], temperature=2.0)
    torch.testing.assert_close((logits / 2).softmax(1), torch.tensor([[0.625, 0.375]]))
    student = torch.tensor([[2 * math.log(0.625 / 0.375), 0.0]])
    assert soft_target_loss(student, logits, temperature=2.0).abs() < 1e-6


def test_one_view_alone_is_what_it_was() -> None:
    logits = torch.randn(3, 5)
    torch.testing.assert_close(fused([logits], temperature=4.0).softmax(1), logits.softmax(1))


def test_each_view_is_asked_for_once_and_taps_are_those_of_the_batch_itself() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Identity()).eval()
    views = {number: torch.randn(2, 3, 2, 2) for number in range(3)}
    asked: list[tuple[Address, int]] = []

    def redrawn(address: Address, number: int) -> Batch:
        asked.append((address, number))
        return Batch(views[number], torch.zeros(2, dtype=torch.int64))

    address = Address(seed=1, step=7, part=1, num_parts=2)
    source = FusedViews(TeacherHere(teacher, ["1"]), redrawn, num_views=3, temperature=4.0)
    outputs = source.outputs(Batch(views[0], torch.zeros(2, dtype=torch.int64)), address)
    assert asked == [(address, 1), (address, 2)]
    mean = torch.stack([(teacher(view) / 4).softmax(1) for view in views.values()]).mean(0)
    torch.testing.assert_close((outputs.logits / 4).softmax(1), mean)
    assert torch.equal(outputs.taps["1"], teacher[:2](views[0]))
    assert not outputs.logits.requires_grad
