"""Activations as a part of the objective: their error, its weight over the course, and where they can be had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.data import Batch
from distill.training.objective import Address, Labels, Outputs, Seen, Tapped, TeacherHere
from distill.training.objectives.fading_features import FadingFeatures, like_the_teachers, relative_error_by_image

BATCH = Batch(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1]))


def network(seed: int, *, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 5, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(80, 2)
    ).eval()


def test_the_error_of_an_image_is_relative_to_the_teachers_mean_square() -> None:
    teacher = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]])
    student = torch.tensor([[2.0, 3.0], [9.0, 9.0], [2.0, 2.0]])
    assert relative_error_by_image(student, teacher).tolist() == pytest.approx([0.5 / 5, 0.0, 0.0])


def test_rows_apart_have_the_mean_of_rows_together() -> None:
    student, teacher = torch.randn(2, 6, 3, 2, 2).unbind()
    apart = [relative_error_by_image(student[rows], teacher[rows]).mean() for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(relative_error_by_image(student, teacher).mean(), torch.stack(apart).mean())


def test_an_image_without_an_activation_gives_no_gradient_and_nothing_infinite() -> None:
    student = torch.ones(1, 3, requires_grad=True)
    relative_error_by_image(student, torch.zeros(1, 3)).sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_the_weight_fades_as_half_a_cosine(progress: float, share: float) -> None:
    student, teacher = network(0), network(1)
    objective = FadingFeatures(Labels(), ["1", "3"], weight=0.3)
    assert objective.taps == ("1", "3")
    outputs = Tapped(student, objective.taps)(BATCH.images)
    seen = Seen(outputs, BATCH, Address(0, 0), TeacherHere(teacher, objective.taps), progress=progress)
    errors = [
        relative_error_by_image(seen.student.taps[path], seen.teacher.taps[path]).mean() for path in objective.paths
    ]
    expected = Labels()(seen) + 0.3 * share * torch.stack(errors).mean()
    torch.testing.assert_close(objective(seen), expected)
    assert seen.detached().progress == progress


class Critic(Labels):
    """An objective with taps, parameters and an optimizer of its own."""

    taps = ("3",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.LazyLinear(1)

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        self.scale(student.taps["3"].flatten(1))

    def own_loss(self, seen: Seen) -> Tensor | None:
        return self.scale(seen.student.taps["3"].flatten(1)).mean()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_the_objective_within_keeps_its_taps_its_own_loss_and_its_optimizer() -> None:
    objective = FadingFeatures(Critic(), ["1", "3"], weight=1.0)
    assert set(objective.taps) == {"1", "3"}
    outputs = Tapped(network(0), objective.taps)(BATCH.images)
    objective.prepare(outputs.detached(), outputs.detached())
    seen = Seen(outputs, BATCH, Address(0, 0), TeacherHere(network(1), objective.taps))
    assert objective.own_loss(seen.detached()) is not None
    assert isinstance(objective.optimizer(), torch.optim.SGD)


def test_boundaries_that_differ_or_are_not_there_are_left_out_with_the_reason() -> None:
    paths, others = like_the_teachers(
        ["1", "2", "9", "0"], student=network(0, width=6), teacher=network(1), batch=BATCH
    )
    assert paths == []
    assert others["1"] == "(6, 4, 4) in the student, (4, 4, 4) in the teacher"
    assert "changed in place" in others["2"]
    assert others["9"] == "no module of both networks"
    paths, _ = like_the_teachers(["1", "3"], student=network(0), teacher=network(1), batch=BATCH)
    assert paths == ["1", "3"]
