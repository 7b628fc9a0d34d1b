"""The ranks that train one network together: the gradients of a whole batch, each rank finding those of its rows.

They are exchanged here and not by DistributedDataParallel, which ends at parameters that have no gradient, counts ranks
where rows count, and knows no batch norms that share their statistics on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distill.data import Batch
from distill.distributed.shared_board import share_board
from distill.distributed.transport import Averager, Store
from distill.training.horizon import Horizon
from distill.training.objective import Address, Seen, Tapped, TeacherOutputs
from distill.training.precision import widened
from distill.training.shared_norms import SharedStatistics
from distill.training.trained import Trained

# This rank's rows of a batch, and its step -> the loss of the whole, the gradients being found
Learner = Callable[[Batch, int], Tensor]
Computing = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class Team:
    """The ranks that train one network together, and how they reach each other."""

    rank: int = 0
    world_size: int = 1
    store: Store | None = None
    backend: str = "gloo"
    timeout_s: float = 600.0
    shared_memory: bool = True  # whether ranks of one host may show each other small tensors in memory

    def share(self, batch_size: int) -> float:
        """Return the share of a batch's rows that this rank has."""
        return len(range(self.rank, batch_size, self.world_size)) / batch_size

    def meet(self) -> Averager:
        """Return what sums over the ranks; all of them must call."""
        assert self.store is not None, "several ranks meet in a store"
        return Averager(
            self.store,
            rank=self.rank,
            group=range(self.world_size),
            share=1.0,  # losses have their weights already, as the backward passes of shared batch norms need it
            timeout_s=self.timeout_s,
            backend=self.backend,
        )

    def gatherer(self, others: Averager) -> Callable[[Tensor], Tensor]:
        """Return what gathers small tensors of all ranks, by the shortest way that there is; all of them must call."""
        wanted = self.shared_memory and self.backend != "nccl"
        board = share_board(
            rank=self.rank,
            world_size=self.world_size,
            gather=others.gather,
            timeout_s=self.timeout_s,
            wanted=wanted,
        )
        return others.gather if board is None else board.gather


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How the gradients of a batch are found from this rank's `share` of its rows; the network's passes are made inside
    `computing`."""

    trained: Trained
    tapped: Tapped
    teacher: TeacherOutputs | None
    team: Team
    share: float
    seed: int
    horizon: Horizon
    computing: Computing = nullcontext

    def differentiate(self, batch: Batch, step: int) -> Tensor:
        """Add this rank's share of the gradients of both losses to what weights have; return that of the network's."""
        objective = self.trained.objective
        address = Address(self.seed, step, self.team.rank, self.team.world_size)
        with self.computing():
            outputs = self.tapped(batch.images)
        progress = step / self.horizon.total
        seen = Seen(widened(outputs), batch, address, self.teacher, progress)
        value: Tensor = self.share * objective(seen)
        own = objective.own_loss(seen.detached())
        value.backward()  # type: ignore[no-untyped-call]
        if own is not None:
            objective.zero_grad(set_to_none=True)  # what the network's loss has left there is none of its business
            (self.share * own).backward()  # type: ignore[no-untyped-call]
        return value.detach()


@contextmanager
def learner(lesson: Lesson) -> Iterator[Learner]:
    """What finds the gradients of a whole batch and returns its mean loss: alone, or together with the other ranks."""
    if lesson.team.world_size == 1:
        yield lesson.differentiate
        return
    others = lesson.team.meet()
    try:
        yield partial(_learn_together, lesson, others, lesson.team.gatherer(others))
    finally:
        others.close()


def _learn_together(
    lesson: Lesson, others: Averager, gather: Callable[[Tensor], Tensor], batch: Batch, step: int
) -> Tensor:
    """Find the gradients of the mean loss over all ranks' rows.

    A parameter has a gradient where it has one on any rank; without any it is left alone, as one rank would leave it.
    """
    with SharedStatistics(gather, lesson.trained.all):
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
