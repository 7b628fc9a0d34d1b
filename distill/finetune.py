"""End-to-end training of a whole network: distillation of an assembled student, or labels alone for a teacher.

Data parallel over the ranks by DistributedDataParallel; with one rank no process group is made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.aliases import load_state
from distill.checkpoint import Checkpoint, CheckpointFolder, contiguous
from distill.data import Batch, Dataset
from distill.losses import soft_target_loss
from distill.memory_format import to_channels_last

NetworkLoss = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True, kw_only=True)
class Team:
    """The ranks that train one network together, and how they reach each other."""

    rank: int = 0
    world_size: int = 1
    store: dist.Store | None = None
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
    checkpoints: CheckpointFolder,
    name: str,
    report: Callable[[int, float, float], None],
) -> None:
    """Train `network` in place on `device`, each rank on its rows of every batch; every rank of the team must call it.

    After each epoch rank 0 writes the checkpoint `name`, from which a later call goes on, and `report` is called with
    (epochs done, mean loss of the epoch in nats, seconds of the epoch).
    """
    to_channels_last(network, device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay, fused=True
    )
    first_epoch = _resume(network, optimizer, checkpoints.load(name))
    with _Parallel(network, team, device) as replica:
        for epoch in range(first_epoch, options.epochs):
            start = time.perf_counter()
            mean = _epoch(replica, dataset, loss, optimizer, options=options, team=team, epoch=epoch)
            if team.rank == 0:
                checkpoints.save(_snapshot(network, optimizer, name=name, epochs=epoch + 1))
            report(epoch + 1, mean, time.perf_counter() - start)
    network.eval()


class _Parallel:
    """The network itself for one rank, a DistributedDataParallel over a fresh process group for several."""

    def __init__(self, network: nn.Module, team: Team, device: torch.device) -> None:
        self._network, self._team, self._device = network, team, device

    def __enter__(self) -> nn.Module:
        team = self._team
        if team.world_size == 1:
            return self._network
        dist.init_process_group(
            team.backend,
            store=team.store,
            rank=team.rank,
            world_size=team.world_size,
            timeout=timedelta(seconds=team.timeout_s),
        )
        devices = [self._device.index] if self._device.type == "cuda" else None
        return DistributedDataParallel(self._network, device_ids=devices)

    def __exit__(self, *_: object) -> None:
        if self._team.world_size > 1:
            dist.destroy_process_group()


def _epoch(
    network: nn.Module,
    dataset: Dataset,
    loss: NetworkLoss,
    optimizer: torch.optim.Optimizer,
    *,
    options: FitOptions,
    team: Team,
    epoch: int,
) -> float:
    network.train()
    steps = dataset.steps_per_epoch
    total = torch.zeros(())
    batches = dataset.train_batches(epoch * steps, (epoch + 1) * steps, part=team.rank, num_parts=team.world_size)
    for step, batch in enumerate(batches, start=epoch * steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps=steps, options=options)
        optimizer.zero_grad(set_to_none=True)
        value = loss(network(batch.images), batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total = total.to(value.device) + value.detach()
    return float(total) / max(1, steps)


def _rate(step: int, *, steps: int, options: FitOptions) -> float:
    warmup = options.warmup_epochs * steps
    if step < warmup:
        return options.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, options.epochs * steps - warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * share))


def _snapshot(network: nn.Module, optimizer: torch.optim.Optimizer, *, name: str, epochs: int) -> Checkpoint:
    momentum = {
        key: optimizer.state[parameter]["momentum_buffer"]
        for key, parameter in network.named_parameters()
        if "momentum_buffer" in optimizer.state[parameter]
    }
    return Checkpoint(name=name, step=epochs, weights=contiguous(network.state_dict()), optimizer=contiguous(momentum))


def _resume(network: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint | None) -> int:
    """Load a checkpoint; return the number of epochs it has behind it."""
    if checkpoint is None:
        return 0
    load_state(network, checkpoint.weights)
    for key, parameter in network.named_parameters():
        if key in checkpoint.optimizer:
            buffer = torch.empty_like(parameter).copy_(checkpoint.optimizer[key])
            optimizer.state[parameter] = {"momentum_buffer": buffer}
    return checkpoint.step
