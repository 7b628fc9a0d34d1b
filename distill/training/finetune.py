"""End-to-end training of a whole network: distillation of an assembled student, or labels alone for a teacher.

Data parallel over the ranks: gradients, losses and the statistics of batch norms are those of the whole batch
(team.py).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distill.blocks.memory_format import to_channels_last
from distill.data import Dataset
from distill.data.addressing import derive_seed
from distill.storage.aliases import load_state
from distill.storage.checkpoint import Checkpoint, CheckpointFolder
from distill.training.companions import Companion, all_judged
from distill.training.horizon import Horizon, rate_of, steps_of, usual_rate
from distill.training.objective import Objective, Tapped, TeacherOutputs
from distill.training.team import Computing, Learner, Lesson, Team, learner
from distill.training.trained import Trained

log = logging.getLogger(__name__)

LOOK_EVERY = 20  # steps between two looks at whether losses are finite, for which a device is waited for
# epoch (from 1), steps (up to its end), loss (mean of the epoch in nats; None: not finite), seconds, `setbacks` where
# there were some, and what is added
Epoch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """SGD with Nesterov momentum 0.9, linear warm-up, then a cosine to zero over all steps.

    Where a loss or a weight is not finite, training goes back to the end of the last epoch, or to the start, and on at
    half the rate; `setbacks` times at most. Without a rate the peak is the usual one of as many steps as there are, and
    follows where they are revised.
    """

    epochs: float
    lr: float | None
    weight_decay: float
    warmup_epochs: float = 0.0
    setbacks: int = 0

    def peak(self, total: int) -> float:
        """Return the peak rate of so many steps in all."""
        return usual_rate(total) if self.lr is None else self.lr


def fit(
    network: nn.Module,
    dataset: Dataset,
    objective: Objective,
    *,
    teacher: TeacherOutputs | None = None,
    in_eval: Collection[str] = (),
    companions: Sequence[Companion] = (),
    computing: Computing = nullcontext,
    horizon: Horizon | None = None,
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
    network. Modules with the paths `in_eval` stay in eval mode: batch norms keep their statistics there. `companions`
    go along, in their order. The network's passes are made inside what `computing` returns. `horizon` has the steps in
    all, by default those of the options' epochs.
    `report` is called after each epoch with the records so far, the same on all ranks, to the last of which it may add,
    and with the weights that companions want to be judged, which the network has in the end too.
    Then rank 0 writes the checkpoint `name`, from which a later call goes on. An epoch whose loss is not finite, after
    all setbacks, is the last and leaves no checkpoint. Returns the records of all epochs, those before a break among
    them. Random numbers (dropout) follow from `seed` and the step, the same on all ranks: what is left out by lot is
    left out everywhere.
    """
    to_channels_last(network, device)
    horizon = horizon or Horizon(steps_of(options.epochs, dataset.steps_per_epoch))
    peak = options.peak(horizon.total)
    trained = Trained(network, objective.to(device), lr=peak, weight_decay=options.weight_decay, companions=companions)
    fitting = Fitting(
        trained=trained,
        dataset=dataset,
        options=options,
        horizon=horizon,
        team=team,
        seed=seed,
        frozen=[network.get_submodule(path) for path in in_eval],
        checkpoints=checkpoints,
        name=name,
    )
    fitting.begin()
    lesson = Lesson(
        trained=trained,
        tapped=Tapped(network, objective.taps),
        teacher=teacher,
        team=team,
        share=team.share(dataset.batch_size),
        seed=seed,
        horizon=fitting.horizon,
        computing=computing,
    )
    with learner(lesson) as learn:
        for course in fitting.epochs(learn):
            with all_judged(companions):
                report(course)
    network.eval()
    if companions:
        _keep_judged(network, companions)
    return fitting.course


@dataclass(kw_only=True)
class Fitting:
    """A network's way through its epochs: how far it has come, and back where it went wrong."""

    trained: Trained
    dataset: Dataset
    options: FitOptions
    horizon: Horizon
    team: Team
    seed: int
    frozen: Sequence[nn.Module]
    checkpoints: CheckpointFolder
    name: str
    course: list[Epoch] = field(default_factory=list)
    step: int = 0
    halvings: int = 0

    def begin(self) -> None:
        """Go on from the checkpoint, if there is one."""
        found = self.checkpoints.load(self.name)
        if found is not None:
            self._load(found)
        elif self.options.setbacks:
            self._save()  # where the first epoch would go back to

    def epochs(self, learn: Learner) -> Iterator[Sequence[Epoch]]:
        """Train; yield the records after each epoch. What is added to the last one until then is checkpointed."""
        setbacks: list[dict[str, Any]] = []
        while self.step < self.horizon.total:
            start = time.perf_counter()
            mean = self._epoch(learn)
            finite = math.isfinite(mean) and self.trained.finite
            record: Epoch = {"epoch": len(self.course) + 1, "steps": self.step, "loss": mean if finite else None}
            if not finite and self.halvings < self.options.setbacks:
                setbacks.append({"step": self.step, "lr": self._peak})
                self._go_back(record["epoch"])
                continue
            record["seconds"] = time.perf_counter() - start
            if setbacks:
                record["setbacks"], setbacks = setbacks, []
            self.course.append(record)
            yield self.course
            if not finite:
                return
            # after what was added to the last record, which has to be in it
            self._save()

    def _epoch(self, learn: Learner) -> float:
        """Train up to the end of the epoch, or to where a loss is seen not to be finite; return the mean loss of its
        batches, the same on all ranks."""
        self.trained.all.train()
        for module in self.frozen:
            module.eval()  # after train(), which has reached these as well
        per_epoch, first = self.dataset.steps_per_epoch, self.step
        steps = range(first, min((first // per_epoch + 1) * per_epoch, self.horizon.total))
        losses = torch.zeros(())
        batches = self.dataset.train_batches(
            steps.start, steps.stop, part=self.team.rank, num_parts=self.team.world_size
        )
        for step, batch in zip(steps, batches, strict=True):
            if step >= self.horizon.total:
                break
            self.trained.forget_gradients()
            torch.manual_seed(derive_seed(self.seed, step))
            value = learn(batch, step)
            total = self.horizon.total
            rate = rate_of(step, total=total, warmup=self.options.warmup_epochs * per_epoch, peak=self._peak)
            self.trained.step(rate, step=step, total=total)
            self.step = step + 1
            # Summed where it is: reading each loss would wait for the device at every step.
            losses = losses.to(value.device) + value
            if self.step % LOOK_EVERY == 0 and not math.isfinite(losses):
                break
        return float(losses) / max(1, self.step - first)

    @property
    def _peak(self) -> float:
        return self.options.peak(self.horizon.total) * 0.5**self.halvings

    def _go_back(self, epoch: int) -> None:
        """Take up the last checkpoint again, at half the rate."""
        halvings, step = self.halvings + 1, self.step
        found = self.checkpoints.load(self.name)
        assert found is not None, "written at the start and after every epoch"
        self._load(found)
        self.halvings = halvings
        if self.team.rank == 0:
            log.warning(
                "%s: a loss is not finite in epoch %d (by step %d); back to step %d, on with half the rate, %.3g",
                self.name, epoch, step, self.step, self._peak,
            )  # fmt: skip

    def _save(self) -> None:
        if self.team.rank != 0:
            return
        progress = {
            "epochs": list(self.course),
            "step": self.step,
            "total": self.horizon.total,
            "halvings": self.halvings,
        }
        self.checkpoints.save(self.trained.snapshot(name=self.name, step=len(self.course), progress=progress))

    def _load(self, checkpoint: Checkpoint) -> None:
        self.trained.load(checkpoint)
        progress = checkpoint.progress
        self.course, self.step = list(progress["epochs"]), progress["step"]
        self.horizon.total, self.halvings = progress["total"], progress["halvings"]


def _keep_judged(network: nn.Module, companions: Sequence[Companion]) -> None:
    """Give the network for good what companions want to be judged."""
    with all_judged(companions):
        judged = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_state(network, judged)
