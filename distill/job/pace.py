"""In which of several ways, that give the same but for rounding, the student is fine-tuned: the fastest here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.blocks.chain import copied
from distill.config.choices import TrainingAmp
from distill.data import Batch, Dataset
from distill.job.context import Context
from distill.observability.numbers import show_count
from distill.recipes.composed import composable, composed
from distill.training.objective import Objective, TeacherHere, TeacherOutputs
from distill.training.pace import Way, step_seconds
from distill.training.precision import InBf16, in_bf16
from distill.training.team import Computing

STAGE = "pace"
LEAST_STEPS = 300  # of which finding out takes some four in a hundred
PAYS = 1.1  # times as fast as plain steps
ROWS = 128  # of a batch at most, to find out with


@dataclass(frozen=True)
class Pace:
    """How steps are computed: passes of student and teacher in bf16, factors of convolutions as one dense kernel."""

    bf16: bool = False
    one_kernel: bool = False

    def __str__(self) -> str:
        return ("bf16" if self.bf16 else "fp32") + (", factors as one kernel" if self.one_kernel else "")

    def computing(self, network: nn.Module, taps: Collection[str], device: torch.device) -> Computing:
        """Return what passes of the network are made inside."""
        return partial(_inside, self, composable(network, taps) if self.one_kernel else [], device)

    def outputs(self, teacher: TeacherOutputs) -> TeacherOutputs:
        """Return the teacher's outputs as they come of it at this pace."""
        return InBf16(teacher) if self.bf16 else teacher


def _inside(pace: Pace, layers: list[nn.Module], device: torch.device) -> AbstractContextManager[object]:
    with ExitStack() as stack:
        if pace.bf16:
            stack.enter_context(in_bf16(device))
        stack.enter_context(composed(layers))
        return stack.pop_all()


def find_pace(
    context: Context, dataset: Dataset, student: nn.Module, teacher: nn.Module, objective: Objective, *, steps: int
) -> Pace:
    """Return the pace of so many steps, as rank 0 has found and recorded it. Every rank must call it."""
    paces = possible(context.config.finetune.amp, factored=bool(composable(student, objective.taps)))
    if steps < LEAST_STEPS or len(paces) == 1:
        return paces[0]

    def work() -> dict[str, Any]:
        batch = dataset.train_batch(0, num_parts=max(1, dataset.batch_size // ROWS, context.world_size))
        seconds = _step_seconds(student, teacher, objective, batch, paces)
        found = choice(paces, seconds)
        times = ", ".join(f"{pace} {1000 * one:.0f} ms" for pace, one in seconds.items())
        images = show_count(len(batch.labels), "image")
        context.say(f"finetune: computed in {found}; a step on {images} takes the device: {times}")
        return {"pace": asdict(found), "step_seconds": {str(pace): one for pace, one in seconds.items()}}

    return Pace(**context.lead(STAGE, work)["pace"])


def times_as_fast(context: Context) -> float:
    """Return how many times as fast as plain ones steps are at the pace that was found; 1 where none was looked for."""
    found = context.run.result(STAGE)
    if found is None:
        return 1.0
    seconds = found["step_seconds"]
    return float(seconds[str(Pace())] / seconds[str(Pace(**found["pace"]))]) if str(Pace()) in seconds else 1.0


def possible(amp: TrainingAmp, *, factored: bool) -> list[Pace]:
    """Return the paces that the configuration allows, the plain one first."""
    precisions = {TrainingAmp.off: [False], TrainingAmp.bf16: [True], TrainingAmp.auto: [False, True]}[amp]
    return [Pace(bf16, one_kernel) for one_kernel in ([False, True] if factored else [False]) for bf16 in precisions]


def choice(paces: Sequence[Pace], seconds: Mapping[Pace, float]) -> Pace:
    """Return the fastest of the paces whose seconds are known; the first, unless that pays."""
    plain, best = paces[0], min(seconds, key=lambda pace: seconds[pace], default=paces[0])
    return plain if plain in seconds and seconds[plain] < PAYS * seconds[best] else best


def _step_seconds(
    student: nn.Module, teacher: nn.Module, objective: Objective, batch: Batch, paces: Sequence[Pace]
) -> dict[Pace, float]:
    device, taps = batch.images.device, objective.taps
    trial, source = copied(student), TeacherHere(teacher, taps)
    ways = {str(pace): Way(pace.computing(trial, taps, device), pace.outputs(source)) for pace in paces}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seconds = step_seconds(trial, deepcopy(objective), batch, ways)
    return {pace: seconds[str(pace)] for pace in paces if str(pace) in seconds}
