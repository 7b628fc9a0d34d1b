"""How long a whole network is trained, and at which rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

USUAL_RATE, MANY_STEPS = 0.02, 800  # of distilling a whole network


@dataclass
class Horizon:
    """The steps that there are in all. They may be revised while training goes on, by what fit() calls and on all
    ranks alike: rates follow from then on, and training ends where there are no more. Checkpoints have them."""

    total: int


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    """Return the steps of so many epochs, the last of which may be a part of one."""
    return math.ceil(epochs * steps_per_epoch)


def usual_rate(steps: int) -> float:
    """Return the peak rate of so many steps of distillation: few cannot repair what a high rate undoes of a good start,
    so it grows with the root of their number, up to where it stays (measured on CIFAR-10: docs/results.md)."""
    return USUAL_RATE * min(1.0, math.sqrt(steps / MANY_STEPS))


def rate_of(step: int, *, total: int, warmup: float, peak: float) -> float:
    """Return the rate of a step: a line up to the peak, then a cosine to zero at the total."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share))
