"""Soft targets at a temperature of each image's own, which follows from the entropy of its prediction."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from distill.errors import ConfigError
from distill.training.objective import Labels, Seen


class EntropyTemperature(Labels):
    """soft_weight * soft targets + (1 - soft_weight) * labels, where the teacher's prediction and the student's are
    softened apart, each by 1 + mu exp(-k H) for its own entropy H: a sure one by up to 1 + mu, an unsure one by little.

    Source: Li et al. 2022 (MiDTD), its formula T = 1 + mu exp(-k H) without a factor T^2 of an image's own. The rest of
    the paper was not at hand, so these are ours: H in nats, of the prediction as it is; no gradient through the
    temperature; the divergence KL(teacher || student); a factor (1 + mu)^2, the same for all, with which the rate and
    the weight of the labels stay what they are for Hinton's at 1 + mu (without it a student learns at a tenth of the
    rate); and the defaults, under which a sure prediction is softened by the usual 4.
    """

    def __init__(self, *, soft_weight: float, mu: float = 3.0, k: float = 1.0) -> None:
        super().__init__()
        for name, value in (("mu", mu), ("k", k)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"finetune.options.{name}", value, "a number >= 0")
        self.soft_weight, self.mu, self.k = soft_weight, mu, k

    def forward(self, seen: Seen) -> Tensor:
        if self.soft_weight == 0:
            return super().forward(seen)
        student, teacher = (self._softened(one.logits.float()) for one in (seen.student, seen.teacher))
        soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return self.soft_weight * (1 + self.mu) ** 2 * soft + (1 - self.soft_weight) * super().forward(seen)

    def _softened(self, logits: Tensor) -> Tensor:
        """Return log probabilities (B, classes), softened."""
        return F.log_softmax(logits / temperatures(logits, mu=self.mu, k=self.k), dim=1)


def temperatures(logits: Tensor, *, mu: float, k: float) -> Tensor:
    """Return 1 + mu exp(-k H) of each row's entropy H in nats, (B, 1) for logits (B, classes), without gradients."""
    log_shares = F.log_softmax(logits.detach().float(), dim=1)
    entropy = -(log_shares.exp() * log_shares).sum(1, keepdim=True)
    return 1 + mu * (-k * entropy).exp()
