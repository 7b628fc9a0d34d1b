"""How a budget of device seconds is divided between blocks and the whole student: a rule, and what it is based on.

A device second is a second of one rank: a command of W ranks spends W a second. Pure figures, without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Measured on CIFAR-10, ResNet-20 at .27 of its parameters, one rank, batches of 128: with time for 70 steps of the
# whole student block steps before them gain nothing, with time for 1,000 they save 15 to 20 % of it.
NOTHING_UP_TO, WHOLE_FROM = 350, 700  # steps of the whole student that there is time for
SHARE = 0.2  # of the time that trains, on one rank
MORE_A_DOUBLING = 0.25  # of that share, with every doubling of ranks: blocks need no communication
MOST = 0.4
FEWEST = 50  # steps of blocks: a good start is worth about 150, and fewer only disturb it
BLOCK_STEP = 1.7  # steps of the whole student that one of all blocks costs: every block has a loss and an optimizer


@dataclass(frozen=True)
class Passes:
    """Seconds of one rank for a batch: a step of the whole student with its teacher, and forward passes of both."""

    step: float
    teacher: float
    student: float


def block_share(steps: float, world_size: int) -> float:
    """Return the share of training time that blocks get, where it would do for so many steps of the whole student."""
    ramp = min(1.0, max(0.0, (steps - NOTHING_UP_TO) / (WHOLE_FROM - NOTHING_UP_TO)))
    return min(MOST, ramp * SHARE * (1 + MORE_A_DOUBLING * math.log2(world_size)))


def block_steps(training_s: float, step_s: float, world_size: int) -> int:
    """Return the steps of every block that belong to so many device seconds of training, a step of the whole student
    taking `step_s` of them."""
    if training_s <= 0:
        return 0
    share = block_share(training_s / step_s, world_size)
    steps = int(share * training_s / (BLOCK_STEP * step_s))
    return steps if steps >= FEWEST else 0


def steps_within(seconds: float, *, step_s: float, epoch_s: float, done: int, steps_per_epoch: int) -> int:
    """Return the steps for which there is time, after `done` of them: seconds, those of a step, and those that the end
    of every epoch takes, also of the last, which may be a part of one."""
    first = steps_per_epoch - done % steps_per_epoch
    if seconds < first * step_s + epoch_s:
        return max(0, int((seconds - epoch_s) / step_s))
    seconds -= first * step_s + epoch_s
    epochs = int(seconds / (steps_per_epoch * step_s + epoch_s))
    seconds -= epochs * (steps_per_epoch * step_s + epoch_s)
    return first + epochs * steps_per_epoch + max(0, int((seconds - epoch_s) / step_s))
