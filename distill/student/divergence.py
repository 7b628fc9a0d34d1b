"""How far a student's answers are from its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithms of the classes' probabilities for logits (images, classes), in float64."""
    return torch.log_softmax(logits.double(), dim=1)


def mean_divergence(teacher: Tensor, logits: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence, in nats an image, of the answers that a student's logits (images,
    classes) are from the teacher's log_probabilities(); nan or infinity where some logits are not finite."""
    student = log_probabilities(logits)
    return float((teacher.exp() * (teacher - student)).sum(dim=1).mean())
