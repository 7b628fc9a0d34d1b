"""What a whole network is trained for: objectives, what they see of a step, and where a teacher's outputs come from.

One from outside is named by finetune.objective=package.module:Class. It may have parameters of its own, which learn
beside the student, are checkpointed with it, and are no part of what is delivered:

    class Adversarial(Distillation):
        taps = ("layer3",)

        def __init__(self, *, weight: float = 0.1, **usual: float) -> None:  # finetune.options.weight=0.2
            super().__init__(**usual)
            self.weight = weight
            self.critic = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(1))

        def forward(self, seen: Seen) -> Tensor:
            return super().forward(seen) + self.weight * self.critic(seen.student.taps["layer3"]).neg().mean()

        def own_loss(self, seen: Seen) -> Tensor:
            student, teacher = self.critic(seen.student.taps["layer3"]), self.critic(seen.teacher.taps["layer3"])
            return (1 + student).relu().mean() + (1 - teacher).relu().mean()
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.data import Batch
from distill.errors import ConfigError, one_of
from distill.training.losses import soft_target_loss

SETTING = "finetune.objective"


@dataclass(frozen=True)
class Outputs:
    """What a network gives for a batch: logits (rows, classes), and what the tapped modules return, by their paths."""

    logits: Tensor
    taps: Mapping[str, Tensor]

    def detached(self) -> Outputs:
        """Return the same values, cut off from the network."""
        return Outputs(self.logits.detach(), {path: tensor.detach() for path, tensor in self.taps.items()})


@dataclass(frozen=True)
class Address:
    """Which rows a batch has: part::num_parts of the training batch `step` under `seed`."""

    seed: int
    step: int
    part: int = 0
    num_parts: int = 1


class TeacherOutputs(Protocol):
    """Where a teacher's outputs come from."""

    def outputs(self, batch: Batch, address: Address) -> Outputs:
        """Return logits and taps of these rows, without gradients."""


@dataclass(frozen=True)
class Seen:
    """What an objective sees of a step: the student's outputs, the rows they are for, and the teacher's outputs, which
    are found when they are first asked for."""

    student: Outputs
    batch: Batch
    address: Address
    source: TeacherOutputs | None = None
    progress: float = 0.0  # the share of the course's steps that lies behind this one, as far as its end is known

    @cached_property
    def teacher(self) -> Outputs:
        assert self.source is not None, "trained without a teacher"
        return self.source.outputs(self.batch, self.address)

    def detached(self) -> Seen:
        """Return the same with a student that gets no gradients."""
        seen = replace(self, student=self.student.detached())
        if "teacher" in self.__dict__:
            seen.__dict__["teacher"] = self.teacher
        return seen


class Objective(nn.Module):
    """What a network is trained for. Parameters and buffers are an objective's whole state: what else it remembers is
    forgotten where fine-tuning is resumed.

    Random numbers drawn in forward() and own_loss() follow from the seed and the step, the same on all ranks.
    """

    taps: Sequence[str] = ()  # paths of modules whose outputs it sees, of student and teacher; each runs once a step

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        """Make parameters whose shapes follow from those of two images' outputs; by default what is lazy is made by
        trying the objective. Called once, on every rank under the same seed."""

    @abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """Return what the student minimises: a scalar, a mean over the rows that it sees."""

    def own_loss(self, seen: Seen) -> Tensor | None:
        """Return what the own parameters minimise; the student in `seen` gets no gradients. None: they minimise the
        student's loss, together with the student."""
        return None

    def optimizer(self) -> torch.optim.Optimizer:
        """Return what moves the own parameters; only asked for where there are some. Its tensors are checkpointed."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Labels(Objective):
    """Cross-entropy against the labels, in nats. Needs no teacher."""

    def forward(self, seen: Seen) -> Tensor:
        return F.cross_entropy(seen.student.logits.float(), seen.batch.labels)


class Distillation(Labels):
    """soft_weight * soft targets + (1 - soft_weight) * labels; without a weight of the soft targets the teacher is not
    asked. Source: Hinton, Vinyals, Dean 2015, section 2 (arXiv:1503.02531)."""

    def __init__(self, *, temperature: float, soft_weight: float) -> None:
        super().__init__()
        self.temperature, self.soft_weight = temperature, soft_weight

    def forward(self, seen: Seen) -> Tensor:
        if self.soft_weight == 0:
            return super().forward(seen)
        soft = soft_target_loss(seen.student.logits, seen.teacher.logits, temperature=self.temperature)
        return self.soft_weight * soft + (1 - self.soft_weight) * super().forward(seen)


class Tapped:
    """A network whose passes, through this, also give what the modules at `taps` return."""

    def __init__(self, network: nn.Module, taps: Sequence[str] = ()) -> None:
        """Raises ConfigError on finetune.objective where a tap is no module's path."""
        self._network = network
        modules = dict(network.named_modules())
        for path in taps:
            if path not in modules or not path:
                raise ConfigError(SETTING, path, f"taps that are modules: {one_of(filter(None, modules), path)}")
        self._modules = {path: modules[path] for path in taps}

    def __call__(self, images: Tensor) -> Outputs:
        """Return the outputs for a batch, differentiable where the network is."""
        heard: dict[str, Tensor] = {}
        versions: dict[str, int] = {}

        def hear(path: str, _module: nn.Module, _inputs: object, output: object) -> None:
            if path in heard:
                raise ConfigError(SETTING, path, "taps that run once in a pass; this module runs again")
            if not isinstance(output, Tensor):
                raise ConfigError(SETTING, path, f"taps that return a tensor; this module returns {type(output)}")
            heard[path], versions[path] = output, output._version

        with ExitStack() as hooks:  # for this pass alone: others, of a validation, are not heard
            for path, module in self._modules.items():
                hooks.callback(module.register_forward_hook(partial(hear, path)).remove)
            logits = self._network(images)
        for path in self._modules:
            if path not in heard:
                raise ConfigError(SETTING, path, "taps that the network runs; this module is not")
            if heard[path]._version != versions[path]:
                raise ConfigError(SETTING, path, "taps that stay; this one is changed in place: tap what changes it")
        return Outputs(logits, heard)


class TeacherHere:
    """A teacher in eval mode whose outputs are computed here, whenever they are asked for."""

    def __init__(self, teacher: nn.Module, taps: Sequence[str] = ()) -> None:
        self._tapped = Tapped(teacher, taps)

    @torch.no_grad()
    def outputs(self, batch: Batch, address: Address) -> Outputs:
        return self._tapped(batch.images)
