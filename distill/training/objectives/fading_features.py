"""An objective with the teacher's activations beside it, whose weight fades over the course."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.data import Batch
from distill.errors import ConfigError
from distill.training.objective import Objective, Outputs, Seen, Tapped

SILENT = 1e-12  # mean square of an activation below which nothing can be relative to it


class FadingFeatures(Objective):
    """Another objective, plus how far the student's activations at `paths` are from the teacher's: relative error by
    image, mean over images and paths. Its weight falls from `weight` to zero with half a cosine, as the rate does:
    activations lead a student that is far from its teacher, and bind one that has other weights to find.

    Hints of this kind: Romero et al. 2015 (FitNets, arXiv:1412.6550), who train on them first, and then without.
    """

    def __init__(self, objective: Objective, paths: Sequence[str], *, weight: float) -> None:
        super().__init__()
        self.objective, self.paths, self.weight = objective, tuple(paths), weight
        self.taps = (*dict.fromkeys([*objective.taps, *paths]),)

    def forward(self, seen: Seen) -> Tensor:
        student, teacher = seen.student.taps, seen.teacher.taps
        errors = [relative_error_by_image(student[path], teacher[path]).mean() for path in self.paths]
        weight = self.weight * 0.5 * (1 + math.cos(math.pi * seen.progress))
        loss: Tensor = self.objective(seen) + weight * torch.stack(errors).mean()
        return loss

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        self.objective.prepare(student, teacher)

    def own_loss(self, seen: Seen) -> Tensor | None:
        return self.objective.own_loss(seen)

    def optimizer(self) -> torch.optim.Optimizer:
        return self.objective.optimizer()


def relative_error_by_image(student: Tensor, teacher: Tensor) -> Tensor:
    """Return each image's mean squared error over the mean square of the teacher's activation, (B,) for (B, ...).

    Over the image alone and not over the batch, so that the mean over ranks' rows is that of the whole batch. An image
    of which the teacher's activation is zero does not count.
    """
    square = teacher.float().square().flatten(1).mean(1)
    error = (student.float() - teacher.float()).square().flatten(1).mean(1)
    return torch.where(square > SILENT, error / square.clamp_min(SILENT), 0.0)


def like_the_teachers(
    paths: Sequence[str], *, student: nn.Module, teacher: nn.Module, batch: Batch
) -> tuple[list[str], dict[str, str]]:
    """Return which modules give activations of the same shape in both networks, which are in eval mode and tried on
    the batch; and why the others do not, by path."""
    alike, others = [], {}
    there = dict(student.named_modules()).keys() & dict(teacher.named_modules())
    for path in paths:
        if path not in there:
            others[path] = "no module of both networks"
            continue
        try:
            shapes = [tuple(_tapped(network, path, batch).shape) for network in (student, teacher)]
        except ConfigError as error:
            others[path] = str(error).partition("expected ")[2]
            continue
        if shapes[0] == shapes[1]:
            alike.append(path)
        else:
            others[path] = f"{shapes[0][1:]} in the student, {shapes[1][1:]} in the teacher"
    return alike, others


def _tapped(network: nn.Module, path: str, batch: Batch) -> Tensor:
    with torch.no_grad():
        return Tapped(network, [path])(batch.images).taps[path]
