"""How long steps of a whole network's training take the device that are computed in different ways."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from distill.data import Batch
from distill.training.horizon import Horizon
from distill.training.objective import Objective, Tapped, TeacherOutputs
from distill.training.team import Computing, Lesson, Team
from distill.training.trained import Trained

log = logging.getLogger(__name__)

ROUNDS = 3
HOPELESS = 2.0  # times as long as another way: it is not tried again


@dataclass(frozen=True)
class Way:
    """What a network's passes are made inside, and where the teacher's outputs come from."""

    computing: Computing
    teacher: TeacherOutputs


def step_seconds(network: nn.Module, objective: Objective, batch: Batch, ways: Mapping[str, Way]) -> dict[str, float]:
    """Return the seconds of a step on the batch in those of the ways that can be gone, the least of a few in turn. It
    changes statistics of batch norms of the network and the objective, and leaves gradients: of copies, therefore."""
    trained = Trained(network.train(), objective.train(), lr=0.0, weight_decay=0.0)
    tapped, device = Tapped(network, objective.taps), batch.images.device
    found: dict[str, float] = {}
    refused: set[str] = set()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            if name in refused or found.get(name, 0.0) > HOPELESS * min(found.values(), default=0.0):
                continue
            lesson = Lesson(
                trained=trained,
                tapped=tapped,
                teacher=way.teacher,
                team=Team(),
                share=1.0,
                seed=0,
                horizon=Horizon(1),
                computing=way.computing,
            )
            try:
                seconds = _seconds(lambda lesson=lesson: _step(lesson, batch), device)  # type: ignore[misc]
            except (RuntimeError, NotImplementedError) as error:
                log.warning("finetune: it cannot be computed in %s here (%s)", name, str(error).splitlines()[0])
                refused.add(name)
                continue
            found[name] = min(found.get(name, seconds), seconds)
    return found


def _step(lesson: Lesson, batch: Batch) -> None:
    lesson.trained.forget_gradients()
    lesson.differentiate(batch, 0)
    lesson.trained.step(0.0, step=0, total=1)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return the device's seconds: on a CPU those of this process, whatever else is busy there."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
