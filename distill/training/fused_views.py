"""A teacher's logits for an image, fused over several augmentations of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.data import Batch
from distill.training.objective import Address, Outputs, TeacherOutputs

# The images of an address, augmented once more: the draw by its number, from 1 -> the batch
Redrawn = Callable[[Address, int], Batch]


class FusedViews:
    """Outputs of a teacher whose logits are fused over `num_views` augmentations of each image: what it says of one
    crop alone is not the student's target. Taps are those of the batch itself, as the student sees it."""

    def __init__(self, source: TeacherOutputs, redrawn: Redrawn, *, num_views: int, temperature: float) -> None:
        self._source, self._redrawn = source, redrawn
        self._num_views, self._temperature = num_views, temperature

    def outputs(self, batch: Batch, address: Address) -> Outputs:
        own = self._source.outputs(batch, address)
        others = [
            self._source.outputs(self._redrawn(address, draw), address).logits for draw in range(1, self._num_views)
        ]
        return Outputs(fused([own.logits, *others], temperature=self._temperature), own.taps)


def fused(logits: Sequence[Tensor], *, temperature: float) -> Tensor:
    """Return the logits (B, classes) of the mean prediction of several, softened by the temperature: softened by the
    same they give that mean. Float32.

    Source: averaging the teacher's predictions over views of an image, as MiDTD (Li et al. 2022) fuses its logits; that
    probabilities are averaged and not logits is ours.
    """
    shares = torch.stack([torch.log_softmax(one.float() / temperature, dim=1) for one in logits])
    return temperature * (torch.logsumexp(shares, dim=0) - math.log(len(logits)))
