"""The objective that finetune.objective names, made and tried before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from distill.data import Batch
from distill.errors import ConfigError
from distill.extensions import called, named, reason, takes
from distill.training.losses import refuse_no_loss
from distill.training.objective import SETTING, Address, Distillation, Objective, Seen, Tapped, TeacherHere
from distill.training.objectives.entropy_temperature import EntropyTemperature

OBJECTIVES: dict[str, type[Objective]] = {
    "distillation": Distillation,
    "entropy_temperature": EntropyTemperature,
}


def make_objective(name: str, *, options: Mapping[str, object], settings: Mapping[str, object]) -> Objective:
    """Return the objective that finetune.objective names, made of its own `options`, and of those of the `settings`
    that it takes. Raises ConfigError on finetune.objective or finetune.options."""
    kind: Callable[..., Objective] = named(SETTING, name, OBJECTIVES, "distill.objectives")
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ConfigError(SETTING, name, "a class that derives from distill.training.objective.Objective")
    taken = {key: value for key, value in settings.items() if takes(kind, key) and key not in options}
    return called("finetune.options", kind, options=options, **taken)


def try_out(objective: Objective, name: str, *, student: nn.Module, teacher: nn.Module, batch: Batch) -> None:
    """Let the objective called `name` make its parameters, and see that it can train: one pass of both networks as they
    are, which stay so but for gradients of the student's. Raises ConfigError on finetune.objective."""
    source, tapped = TeacherHere(teacher, objective.taps), Tapped(student, objective.taps)
    address = Address(seed=0, step=0)
    try:
        seen = Seen(tapped(batch.images), batch, address, source)
        objective.prepare(seen.detached().student, seen.teacher)
        objective.to(batch.images.device)
        loss, own = objective(seen), objective.own_loss(seen.detached())
    except ConfigError:
        raise
    except Exception as error:  # whatever stands in the user's class
        raise ConfigError(SETTING, name, f"an objective that runs on a batch ({reason(error)})") from error
    refuse_no_loss(SETTING, name, loss)
    if own is not None:
        refuse_no_loss(SETTING, f"{name}.own_loss", own)
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if all(found is None for found in torch.autograd.grad(loss, weights, allow_unused=True)):
        raise ConfigError(SETTING, name, "a loss that depends on the student's outputs")
