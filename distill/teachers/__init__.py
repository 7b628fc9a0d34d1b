"""Teachers: architectures by source and name, and the weights that go into them. Knows no configuration objects."""

from distill.teachers.architectures import build_architecture, check_name, registries_of
from distill.teachers.published import pretrained_weights
from distill.teachers.weights import (
    expected_preprocessing,
    load_backbone,
    load_teacher_weights,
    load_weights,
    options_for_weights,
)

__all__ = [
    "build_architecture",
    "check_name",
    "expected_preprocessing",
    "load_backbone",
    "load_teacher_weights",
    "load_weights",
    "options_for_weights",
    "pretrained_weights",
    "registries_of",
]
