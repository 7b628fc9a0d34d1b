"""End-to-end training of a whole network: distillation of an assembled student, or labels alone for a teacher.

Data parallel over the ranks: gradients, losses and the statistics of batch norms are those of the whole batch. They are
exchanged here and not by DistributedDataParallel, which ends at parameters that have no gradient, counts ranks where
rows count, and knows no batch norms that share their statistics on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.blocks.memory_format import to_channels_last
from distill.data import Batch, Dataset
from distill.data.addressing import derive_seed
from distill.distributed.transport import Averager, Store
from distill.storage.aliases import load_state
from distill.storage.checkpoint import Checkpoint, CheckpointFolder, contiguous
from distill.training.objective import Address, Objective, Seen, Tapped, TeacherOutputs
from distill.training.shared_norms import SharedStatistics

OWN = "objective/"  # in a checkpoint: what is the objective's
# This rank's rows of a batch, and its step -> the loss of the whole, the gradients being found
Learner = Callable[[Batch, int], Tensor]
USUAL_RATE, MANY_STEPS = 0.02, 800  # of distilling a whole network
Epoch = dict[str, Any]  # epoch (from 1), loss (mean of the epoch in nats; None: not finite), seconds, and what is added


@dataclass(frozen=True, kw_only=True)
class Team:
    """The ranks that train one network together, and how they reach each other."""

    rank: int = 0
    world_size: int = 1
    store: Store | None = None
    backend: str = "gloo"
    timeout_s: float = 600.0

    def share(self, batch_size: int) -> float:
        """Return the share of a batch's rows that this rank has."""
        return len(range(self.rank, batch_size, self.world_size)) / batch_size


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    """Return the steps of so many epochs, the last of which may be a part of one."""
    return math.ceil(epochs * steps_per_epoch)


def usual_rate(steps: int) -> float:
    """Return the peak rate of so many steps of distillation: few cannot repair what a high rate undoes of a good start,
    so it grows with the root of their number, up to where it stays (measured on CIFAR-10: docs/results.md)."""
    return USUAL_RATE * min(1.0, math.sqrt(steps / MANY_STEPS))


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """SGD with Nesterov momentum 0.9, linear warm-up, then a cosine to zero over all steps."""

    epochs: float
    lr: float
    weight_decay: float
    warmup_epochs: float = 0.0


def fit(
    network: nn.Module,
    dataset: Dataset,
    objective: Objective,
    *,
    teacher: TeacherOutputs | None = None,
    in_eval: Collection[str] = (),
    options: FitOptions,
    team: Team,
    device: torch.device,
    seed: int,
    checkpoints: CheckpointFolder,
    name: str,
    report: Callable[[Sequence[Epoch]], None],
) -> list[Epoch]:
    """Train `network` in place on `device`, each rank on its rows of every batch; every rank of the team must call it.

    The objective sees the outputs of `teacher`; its own parameters (with the same values on all ranks) learn with the
    network. Modules with the paths `in_eval` stay in eval mode: batch norms keep their statistics there.
    `report` is called after each epoch with the records so far, the same on all ranks, to the last of which it may add.
    Then rank 0 writes the checkpoint `name`, from which a later call goes on. An epoch whose loss is not finite is the
    last and leaves no checkpoint. Returns the records of all epochs, those before a break among them. Random numbers
    (dropout) follow from `seed` and the step, the same on all ranks: what is left out by lot is left out everywhere.
    """
    to_channels_last(network, device)
    trained = Trained(network, objective.to(device), options)
    course = _resume(trained, checkpoints.load(name))
    frozen = [network.get_submodule(path) for path in in_eval]
    share = team.share(dataset.batch_size)
    tapped = Tapped(network, objective.taps)
    total = steps_of(options.epochs, dataset.steps_per_epoch)
    lesson = Lesson(trained=trained, tapped=tapped, teacher=teacher, team=team, share=share, seed=seed, total=total)
    with _learner(lesson) as learn:
        for epoch in range(len(course), math.ceil(options.epochs)):
            start = time.perf_counter()
            network.train()
            objective.train()
            for module in frozen:
                # After train(), which has reached these as well.
                module.eval()
            mean = _epoch(trained, dataset, learn, options=options, team=team, epoch=epoch, seed=seed)
            finite = math.isfinite(mean)
            course.append(
                {"epoch": epoch + 1, "loss": mean if finite else None, "seconds": time.perf_counter() - start}
            )
            # Before the checkpoint: what is added to the last record here has to be in it.
            report(course)
            if not finite:
                break
            if team.rank == 0:
                checkpoints.save(trained.snapshot(name=name, course=course))
    network.eval()
    return course


class Trained:
    """What learns: the network, and the objective's own parameters where it has some; with their optimizers."""

    def __init__(self, network: nn.Module, objective: Objective, options: FitOptions) -> None:
        self.network, self.objective = network, objective
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            lr=options.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.own = objective.optimizer() if any(True for _ in objective.parameters()) else None
        self.all = nn.ModuleList([network, objective])

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Change all weights by the gradients that they have, the network's at this rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.own is not None:
            self.own.step()

    def snapshot(self, *, name: str, course: Sequence[Epoch]) -> Checkpoint:
        momentum = {
            key: self.optimizer.state[parameter]["momentum_buffer"]
            for key, parameter in self.network.named_parameters()
            if "momentum_buffer" in self.optimizer.state[parameter]
        }
        states = self.own.state_dict()["state"] if self.own else {}
        own = {
            f"{OWN}{number}/{key}": value
            for number, state in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        weights = self.network.state_dict()
        weights |= {f"{OWN}{key}": value for key, value in self.objective.state_dict().items()}
        return Checkpoint(
            name=name,
            step=len(course),
            weights=contiguous(weights),
            optimizer=contiguous(momentum | own),
            progress={"epochs": list(course)},
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from the state that snapshot() took."""
        load_state(self.network, _without(checkpoint.weights))
        for key, parameter in self.network.named_parameters():
            if key in checkpoint.optimizer:
                buffer = torch.empty_like(parameter).copy_(checkpoint.optimizer[key])
                self.optimizer.state[parameter] = {"momentum_buffer": buffer}
        load_state(self.objective, _own(checkpoint.weights))
        if self.own is not None:
            states: dict[int, dict[str, Tensor]] = {}
            for name, value in _own(checkpoint.optimizer).items():
                number, key = name.split("/", 1)
                states.setdefault(int(number), {})[key] = value
            self.own.load_state_dict(self.own.state_dict() | {"state": states})


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(OWN): tensor for name, tensor in tensors.items() if name.startswith(OWN)}


def _without(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(OWN)}


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How the gradients of a batch are found from this rank's `share` of its rows."""

    trained: Trained
    tapped: Tapped
    teacher: TeacherOutputs | None
    team: Team
    share: float
    seed: int
    total: int  # steps of the course

    def differentiate(self, batch: Batch, step: int) -> Tensor:
        """Add this rank's share of the gradients of both losses to what weights have; return that of the network's."""
        objective = self.trained.objective
        address = Address(self.seed, step, self.team.rank, self.team.world_size)
        seen = Seen(self.tapped(batch.images), batch, address, self.teacher, progress=step / self.total)
        value: Tensor = self.share * objective(seen)
        own = objective.own_loss(seen.detached())
        value.backward()  # type: ignore[no-untyped-call]
        if own is not None:
            objective.zero_grad(set_to_none=True)  # what the network's loss has left there is none of its business
            (self.share * own).backward()  # type: ignore[no-untyped-call]
        return value.detach()


@contextmanager
def _learner(lesson: Lesson) -> Iterator[Learner]:
    """What finds the gradients of a whole batch and returns its mean loss: alone, or together with the other ranks."""
    team = lesson.team
    if team.world_size == 1:
        yield lesson.differentiate
        return
    assert team.store is not None, "several ranks meet in a store"
    others = Averager(
        team.store,
        rank=team.rank,
        group=range(team.world_size),
        share=1.0,  # losses have their weights already, as the backward passes of shared batch norms need it
        timeout_s=team.timeout_s,
        backend=team.backend,
    )
    try:
        yield partial(_learn_together, lesson, others)
    finally:
        others.close()


def _learn_together(lesson: Lesson, others: Averager, batch: Batch, step: int) -> Tensor:
    """Find the gradients of the mean loss over all ranks' rows.

    A parameter has a gradient where it has one on any rank; without any it is left alone, as one rank would leave it.
    """
    with SharedStatistics(others.gather, lesson.trained.all):
        value = lesson.differentiate(batch, step)
    parameters = [parameter for parameter in lesson.trained.all.parameters() if parameter.requires_grad]
    known = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=value.device)
    without = [number for number, parameter in enumerate(parameters) if parameter.grad is None]
    for number in without:
        # Averaging is one exchange of equal lengths, so that every rank must have every gradient.
        parameters[number].grad = torch.zeros_like(parameters[number])
    others([*(parameter.grad for parameter in parameters if parameter.grad is not None), known, value])()
    for number in without:
        if known[number] == 0:
            parameters[number].grad = None
    return value


def _epoch(
    trained: Trained,
    dataset: Dataset,
    learn: Learner,
    *,
    options: FitOptions,
    team: Team,
    epoch: int,
    seed: int,
) -> float:
    """Return the mean loss of an epoch's batches, the same on all ranks."""
    per_epoch, total = dataset.steps_per_epoch, steps_of(options.epochs, dataset.steps_per_epoch)
    steps = range(epoch * per_epoch, min((epoch + 1) * per_epoch, total))
    losses = torch.zeros(())
    batches = dataset.train_batches(steps.start, steps.stop, part=team.rank, num_parts=team.world_size)
    for step, batch in zip(steps, batches, strict=True):
        trained.forget_gradients()
        torch.manual_seed(derive_seed(seed, step))
        value = learn(batch, step)
        trained.step(_rate(step, total=total, warmup=options.warmup_epochs * per_epoch, peak=options.lr))
        # Summed where it is: reading each loss would wait for the device at every step.
        losses = losses.to(value.device) + value
    return float(losses) / max(1, len(steps))


def _rate(step: int, *, total: int, warmup: float, peak: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def _resume(trained: Trained, checkpoint: Checkpoint | None) -> list[Epoch]:
    """Load a checkpoint; return the records of the epochs that it has behind it."""
    if checkpoint is None:
        return []
    trained.load(checkpoint)
    return list(checkpoint.progress["epochs"])
