"""How far answers are from the teacher's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from distill.student.divergence import log_probabilities, mean_divergence

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def test_the_same_answers_are_no_way_off_and_others_are_as_far_as_pytorch_says() -> None:
    teacher, other = log_probabilities(LOGITS), LOGITS.flip(0)
    assert mean_divergence(teacher, LOGITS + 3.0) < 1e-9
    wanted = F.kl_div(log_probabilities(other), teacher, reduction="batchmean", log_target=True)
    assert math.isclose(mean_divergence(teacher, other), float(wanted), rel_tol=1e-12)


def test_logits_that_are_no_numbers_give_none() -> None:
    broken = LOGITS.clone()
    broken[0, 0] = math.inf
    assert not math.isfinite(mean_divergence(log_probabilities(LOGITS), broken))
