"""One student block and its training: update on a batch, look at held-out batches, stop by its own rule.

Knows nothing of other blocks, ranks or files. Losses stay on the device and are read every `log_every` steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from distill.cuda.graphs import Captured, Work, cuda_capture
from distill.cuda.lanes import Lane
from distill.planning.unit import Unit
from distill.storage.aliases import load_state
from distill.storage.checkpoint import Checkpoint, contiguous, unit_name
from distill.training.channels import ChannelMap
from distill.training.losses import block_loss, relative_error
from distill.training.optim import TrainerOptions, make_optimizer, set_rates
from distill.training.stopwatch import Stopwatch

# Begins to replace tensors by their means over several ranks; what it returns waits until they are.
Average: TypeAlias = Callable[[list[Tensor]], Callable[[], None]]


@dataclass
class Progress:
    """What a checkpoint remembers of a block's course besides its tensors."""

    rel_error_first: float = math.nan
    rel_error_last: float = math.nan
    rel_error_held_out: float | None = None
    best_held_out: float = math.inf
    looks_without_improvement: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Reading:
    """Losses of one block as read at the end of a log interval: `relative_error` is its mean over the interval, `lr`
    the rate of the last step, where layers differ that of the most weights."""

    unit: int
    step: int
    loss: float
    relative_error: float
    lr: float
    seconds: float


class BlockTrainer:
    """The training of one unit, from step `step` to `budget`. `module` is on its device already."""

    def __init__(
        self,
        unit: Unit,
        module: nn.Module,
        *,
        budget: int,
        device: torch.device,
        options: TrainerOptions,
        lane: Lane | None = None,
    ) -> None:
        """With a `lane` that captures, enter it around every update and look."""
        self.unit = unit
        self.module = module
        self._training_mode()
        self.budget = budget
        self.device = device
        self.step = 0
        self.progress = Progress()
        self.diverged_at: int | None = None
        self.stopped_early = False
        self._reads = None if unit.reads is None else ChannelMap(unit.reads, device)
        self._gives = None if unit.gives is None else ChannelMap(unit.gives, device)
        self._options = options
        self._loss = block_loss(options.loss)
        self._optimizer = make_optimizer(module, budget=budget, options=options, device=device)
        self.lane = lane or Lane()
        self._watch = Stopwatch(device)
        self._losses: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._held_out: list[Tensor] = []
        self._average: Average | None = None
        self._averaged: Callable[[], None] | None = None  # waits for the means of the last step's gradients
        self._prepare()
        self._finite = self._snapshot()

    @property
    def finished(self) -> bool:
        return self.step >= self.budget or self.stopped_early or self.diverged_at is not None

    def share(self, average: Average) -> None:
        """Train this block together with other ranks: `average` replaces gradients, and losses, by which they judge the
        block, by their mean over all of them, in the background: the weights change when they are needed next."""
        self._average = average
        self._prepare()

    def update(self, inputs: Tensor, targets: Tensor) -> Reading | None:
        """One step on a batch. Shapes: the unit's two boundaries, batch first. Returns losses when it reads them."""
        with self._watch.running():
            self._settle()
            rate = set_rates(self._optimizer, self.step, budget=self.budget, options=self._options)
            loss, error = self._update(inputs, targets)
            if self._average is not None:
                gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
                # The losses as well: ranks that judged by their own rows could stop a block at different steps.
                self._averaged = self._average([*gradients, loss, error])
        self._losses.append(loss)
        self._errors.append(error)
        self.step += 1
        if self.step % self._options.log_every == 0 or self.step in (1, self.budget):
            return self.read(rate)
        return None

    def _prepare(self) -> None:
        """Make what an update consists of: one piece of work, or two where gradients are averaged in between."""
        if self._average is None:
            self._update = self._captured(self._learn)
        else:
            self._update, self._apply = self._captured(self._differentiate), self._captured(self._descend)

    def _learn(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Update the weights; return the loss and the relative error before that."""
        found = self._differentiate(inputs, targets)
        self._descend()
        return found

    def _differentiate(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Find the gradients; return the loss and the relative error."""
        # None and not zeros: where this is captured, the gradients are then made in the graph's own memory.
        self._optimizer.zero_grad(set_to_none=True)
        targets = targets if self._gives is None else self._gives(targets)
        outputs = self.forward(inputs)
        error = relative_error(outputs, targets)
        loss = error if self._loss is relative_error else self._loss(outputs, targets).float()
        loss.backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), error.detach()]

    def _descend(self) -> list[Tensor]:
        """Change the weights by the gradients that they have."""
        if self._options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._options.clip_norm)
        self._optimizer.step()
        return []

    def _settle(self) -> None:
        """Do what is left of the last update where its gradients were still being averaged."""
        if self._averaged is not None:
            averaged, self._averaged = self._averaged, None
            averaged()
            self._apply()

    def _captured(self, work: Work) -> Work:
        """Return the work as a CUDA graph, where this block's lane captures."""
        if not self.lane.captures:
            return work
        capture = cuda_capture(self.lane)

        def capture_update(work: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
            groups = self._optimizer.param_groups
            before = [group.get("capturable", False) for group in groups]
            for group in groups:
                group["capturable"] = True  # only now: PyTorch warns of steps that could be captured and are not
            try:
                return capture(work)
            finally:
                for group, value in zip(groups, before, strict=True):
                    group["capturable"] = value

        return Captured(work, name=f"block {self.unit.name}", capture=capture_update, lane=self.lane)

    def read(self, rate: float = 0.0) -> Reading:
        """Read the losses since the last reading; a loss that is not finite ends the block (see `diverged_at`)."""
        self.lane.join()
        self._settle()
        losses = torch.stack(self._losses).tolist()
        errors = torch.stack(self._errors).tolist()
        first = self.step - len(losses)
        self._losses.clear()
        self._errors.clear()
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                self.diverged_at = first + offset
                break
        if first == 0:
            self.progress.rel_error_first = errors[0]
        if self.diverged_at is None:
            self.progress.rel_error_last = sum(errors) / len(errors)
        self.progress.seconds += self._watch.read()
        self._watch = Stopwatch(self.device)
        mean_loss = sum(losses) / len(losses)
        return Reading(self.unit.number, self.step, mean_loss, sum(errors) / len(errors), rate, self.progress.seconds)

    def look(self, inputs: Tensor, targets: Tensor, *, last: bool) -> None:
        """See a held-out batch; after the `last` of a look, decide whether the block has stopped improving."""
        self._settle()
        self.module.eval()
        with torch.no_grad():
            targets = targets if self._gives is None else self._gives(targets)
            self._held_out.append(relative_error(self.forward(inputs), targets))
        self.lane.let_go()
        self._training_mode()
        if not last:
            return
        error = torch.stack(self._held_out).mean().item()
        self._held_out.clear()
        progress = self.progress
        progress.rel_error_held_out = error
        # An error that is not a number is smaller than nothing, so that it counts as no improvement.
        if error < progress.best_held_out * (1 - self._options.min_delta):
            progress.best_held_out, progress.looks_without_improvement = error, 0
        else:
            progress.looks_without_improvement += 1
        self.stopped_early = 0 < self._options.patience <= progress.looks_without_improvement

    def checkpoint(self) -> Checkpoint | None:
        """Return the state after the last step, or None (keeping the last one) when it is not finite."""
        if self._losses:
            self.read()
        state = self._snapshot()
        if self.diverged_at is not None or not all(tensor.isfinite().all() for tensor in state.weights.values()):
            return None
        self._finite = state
        return state

    def final(self) -> Checkpoint:
        """Return what this block delivers: its last state, or after divergence the last finite one."""
        if self._losses:
            self.read()
        state = self._snapshot()
        if self.diverged_at is None and not all(t.isfinite().all() for t in state.weights.values()):
            self.diverged_at = self.step
        if self.diverged_at is not None:
            return self._finite
        return state

    def free(self) -> None:
        """Let go of weights, optimizer state and graphs: the block is on its way to the ledger, or to another rank.

        The tensors are emptied, because a module and its fx graph refer to each other: forgotten, they would wait for
        Python's collector, which does not know how much memory tensors take.
        """
        self._optimizer.state.clear()
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.grad = None
            tensor.data = tensor.new_empty(0)
        self._finite = Checkpoint(self._finite.name, self._finite.step, {})
        self._average = self._averaged = None
        self._update = self._apply = _freed

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: same weights, optimizer state and step, hence the same bits as without the break."""
        load_state(self.module, checkpoint.weights)
        self.step = checkpoint.step
        self.progress = Progress(**checkpoint.progress)
        saved = checkpoint.optimizer
        for name, parameter in self.module.named_parameters():
            keys = {key.removeprefix(f"{name}/"): value for key, value in saved.items() if key.startswith(f"{name}/")}
            self._optimizer.state[parameter] = {key: self._restored(value, parameter) for key, value in keys.items()}
        self._finite = checkpoint
        self._prepare()  # a graph made before works on other tensors

    def take_over(self, state: Checkpoint) -> None:
        """Go on from the state that another rank has reached; where this block diverges, the last checkpoint still
        stands, as it would have there."""
        finite = self._finite
        self.resume(state)
        self._finite = finite

    def _restored(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Fused updates walk through memory, so state must have its parameter's own strides; steps are counted on the
        parameters' device (see make_optimizer)."""
        return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.to(self.device)

    def _snapshot(self) -> Checkpoint:
        self.lane.join()
        self._settle()
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.module.named_parameters()}
        optimizer = {
            f"{names[parameter]}/{key}": value
            for parameter, state in self._optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        weights = {name: tensor.clone() for name, tensor in contiguous(self.module.state_dict()).items()}
        return Checkpoint(
            name=unit_name(self.unit.number),
            step=self.step,
            weights=weights,
            optimizer={name: tensor.clone() for name, tensor in contiguous(optimizer).items()},
            progress=asdict(self.progress),
        )

    def _training_mode(self) -> None:
        """Batch norms in training mode, dropout off: the targets are those of a teacher without dropout, and its random
        numbers would depend on what else this process has drawn."""
        self.module.train()
        for part in self.module.modules():
            if isinstance(part, (nn.modules.dropout._DropoutNd, *_layers_of_torchvision())):
                part.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the student's activation. With amp the input is rounded once for all who read it: what passes by the
        convolutions would otherwise stay float32, and every sum with it."""
        inputs = inputs if self._reads is None else self._reads(inputs)
        if self._options.amp == "off":
            return self.module(inputs.float())  # type: ignore[no-any-return]
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return self.module(inputs.bfloat16())  # type: ignore[no-any-return]


def _layers_of_torchvision() -> tuple[type[nn.Module], ...]:
    """Return the layer that drops whole samples. A network has one only where torchvision was imported, which takes
    seconds."""
    ops = sys.modules.get("torchvision.ops")
    return () if ops is None else (ops.StochasticDepth,)


def _freed(*_: Tensor) -> list[Tensor]:
    raise AssertionError("a block that was freed trains on")
