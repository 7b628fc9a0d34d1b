"""End-to-end training of a whole network: distillation of an assembled student, or labels alone for a teacher.

Data parallel over the ranks: gradients, losses and the statistics of batch norms are those of the whole batch. They are
exchanged here and not by DistributedDataParallel, which ends at parameters that have no gradient, counts ranks where
rows count, and knows no batch norms that share their statistics on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.blocks.memory_format import to_channels_last
from distill.data import Batch, Dataset
from distill.data.addressing import derive_seed
from distill.distributed.transport import Averager, Store
from distill.storage.aliases import load_state
from distill.storage.checkpoint import Checkpoint, CheckpointFolder, contiguous
from distill.training.losses import soft_target_loss
from distill.training.shared_norms import SharedStatistics

NetworkLoss = Callable[[Tensor, Batch], Tensor]
Learner = Callable[[Batch], Tensor]  # this rank's rows of a batch -> the loss of the whole, the gradients being found
Epoch = dict[str, Any]  # epoch (from 1), loss (mean of the epoch in nats; None: not finite), seconds, and what is added


@dataclass(frozen=True, kw_only=True)
class Team:
    """The ranks that train one network together, and how they reach each other."""

    rank: int = 0
    world_size: int = 1
    store: Store | None = None
    backend: str = "gloo"
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """SGD with Nesterov momentum 0.9, linear warm-up, then a cosine to zero over all steps."""

    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: float = 0.0


def label_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy against the labels. Shapes: logits (batch, classes). Returns a scalar in nats."""
    return F.cross_entropy(logits.float(), batch.labels)


def distillation_loss(teacher: nn.Module, *, temperature: float, soft_weight: float) -> NetworkLoss:
    """Return the loss soft_weight * soft targets + (1 - soft_weight) * labels against a teacher in eval mode.

    Without a weight of the soft targets the teacher does not run. Source: Hinton, Vinyals, Dean 2015, section 2
    (arXiv:1503.02531).
    """
    if soft_weight == 0:
        return label_loss

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch.images)
        soft = soft_target_loss(logits, wanted, temperature=temperature)
        return soft_weight * soft + (1 - soft_weight) * label_loss(logits, batch)

    return loss


def fit(
    network: nn.Module,
    dataset: Dataset,
    loss: NetworkLoss,
    *,
    options: FitOptions,
    team: Team,
    device: torch.device,
    seed: int,
    checkpoints: CheckpointFolder,
    name: str,
    report: Callable[[Sequence[Epoch]], None],
) -> list[Epoch]:
    """Train `network` in place on `device`, each rank on its rows of every batch; every rank of the team must call it.

    `report` is called after each epoch with the records so far, the same on all ranks, to the last of which it may add.
    Then rank 0 writes the checkpoint `name`, from which a later call goes on. An epoch whose loss is not finite is the
    last and leaves no checkpoint. Returns the records of all epochs, those before a break among them. Random numbers
    (dropout) follow from `seed` and the step, the same on all ranks: what is left out by lot is left out everywhere.
    """
    to_channels_last(network, device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay, fused=True
    )
    course = _resume(network, optimizer, checkpoints.load(name))
    with _learner(network, loss, team, dataset.batch_size) as learn:
        for epoch in range(len(course), options.epochs):
            start = time.perf_counter()
            mean = _epoch(network, dataset, learn, optimizer, options=options, team=team, epoch=epoch, seed=seed)
            finite = math.isfinite(mean)
            course.append(
                {"epoch": epoch + 1, "loss": mean if finite else None, "seconds": time.perf_counter() - start}
            )
            report(course)
            if not finite:
                break
            if team.rank == 0:
                checkpoints.save(_snapshot(network, optimizer, name=name, course=course))
    network.eval()
    return course


@contextmanager
def _learner(network: nn.Module, loss: NetworkLoss, team: Team, batch_size: int) -> Iterator[Learner]:
    """What finds the gradients of a whole batch and returns its mean loss: alone, or together with the other ranks."""
    if team.world_size == 1:
        yield partial(_learn_alone, network, loss)
        return
    assert team.store is not None, "several ranks meet in a store"
    share = len(range(team.rank, batch_size, team.world_size)) / batch_size
    others = Averager(
        team.store,
        rank=team.rank,
        group=range(team.world_size),
        share=1.0,  # losses have their weights already, as the backward passes of shared batch norms need it
        timeout_s=team.timeout_s,
        backend=team.backend,
    )
    try:
        yield partial(_learn_together, network, loss, others, share)
    finally:
        others.close()


def _learn_alone(network: nn.Module, loss: NetworkLoss, batch: Batch) -> Tensor:
    value = loss(network(batch.images), batch)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


def _learn_together(network: nn.Module, loss: NetworkLoss, others: Averager, share: float, batch: Batch) -> Tensor:
    """Find the gradients of the mean loss over all ranks' rows, of which this rank has a `share`.

    A parameter has a gradient where it has one on any rank; without any it is left alone, as one rank would leave it.
    """
    with SharedStatistics(others.gather, network):
        value = share * loss(network(batch.images), batch)
        value.backward()  # type: ignore[no-untyped-call]
    value = value.detach()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    known = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=value.device)
    without = [number for number, parameter in enumerate(parameters) if parameter.grad is None]
    for number in without:
        parameters[number].grad = torch.zeros_like(parameters[number])
    others([*(parameter.grad for parameter in parameters if parameter.grad is not None), known, value])()
    for number in without:
        if known[number] == 0:
            parameters[number].grad = None
    return value


def _epoch(
    network: nn.Module,
    dataset: Dataset,
    learn: Learner,
    optimizer: torch.optim.Optimizer,
    *,
    options: FitOptions,
    team: Team,
    epoch: int,
    seed: int,
) -> float:
    """Return the mean loss of an epoch's batches, the same on all ranks."""
    network.train()
    steps = dataset.steps_per_epoch
    total = torch.zeros(())
    batches = dataset.train_batches(epoch * steps, (epoch + 1) * steps, part=team.rank, num_parts=team.world_size)
    for step, batch in enumerate(batches, start=epoch * steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps=steps, options=options)
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(derive_seed(seed, step))
        value = learn(batch)
        optimizer.step()
        total = total.to(value.device) + value
    return float(total) / max(1, steps)


def _rate(step: int, *, steps: int, options: FitOptions) -> float:
    warmup = options.warmup_epochs * steps
    if step < warmup:
        return options.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, options.epochs * steps - warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * share))


def _snapshot(
    network: nn.Module, optimizer: torch.optim.Optimizer, *, name: str, course: Sequence[Epoch]
) -> Checkpoint:
    momentum = {
        key: optimizer.state[parameter]["momentum_buffer"]
        for key, parameter in network.named_parameters()
        if "momentum_buffer" in optimizer.state[parameter]
    }
    return Checkpoint(
        name=name,
        step=len(course),
        weights=contiguous(network.state_dict()),
        optimizer=contiguous(momentum),
        progress={"epochs": list(course)},
    )


def _resume(network: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint | None) -> list[Epoch]:
    """Load a checkpoint; return the records of the epochs that it has behind it."""
    if checkpoint is None:
        return []
    load_state(network, checkpoint.weights)
    for key, parameter in network.named_parameters():
        if key in checkpoint.optimizer:
            buffer = torch.empty_like(parameter).copy_(checkpoint.optimizer[key])
            optimizer.state[parameter] = {"momentum_buffer": buffer}
    return list(checkpoint.progress["epochs"])
