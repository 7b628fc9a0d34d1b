"""A user's program, which mypy finds typed: with the package here, and with the wheel in tests/e2e/test_wheel.py."""

from typing import assert_type

from torch import Tensor, nn
from torch.utils.data import Dataset

import distill


def logits(folder: str, images: Tensor) -> object:
    """Return the outputs of the student in `folder`."""
    student = distill.load_student(folder)
    assert_type(student, nn.Module)
    assert_type(distill.__version__, str)
    return student(images)


def smaller(model: nn.Module, train: Dataset[tuple[Tensor, int]]) -> nn.Module:
    """Return a student of a network at hand."""
    made = distill.compress(model, train, overrides=["distill.steps=100"])
    assert_type(made, distill.Result)
    return made.student
