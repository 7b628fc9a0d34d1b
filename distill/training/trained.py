"""What learns while a whole network is trained, and its state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.storage.aliases import load_state
from distill.storage.checkpoint import Checkpoint, contiguous
from distill.training.companions import Companion
from distill.training.objective import Objective

OWN = "objective/"  # in a checkpoint: what is the objective's
COMPANION = "companion/"  # and what is a companion's, behind its number


class Trained:
    """What learns: the network, and the objective's own parameters where it has some; with their optimizers, and with
    the companions of the network."""

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        *,
        lr: float,
        weight_decay: float,
        companions: Sequence[Companion] = (),
    ) -> None:
        """SGD with Nesterov momentum 0.9 for the network; what the objective asks for, for its own."""
        self.network, self.objective, self.companions = network, objective, companions
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True
        )
        self.own = objective.optimizer() if any(True for _ in objective.parameters()) else None
        self.all = nn.ModuleList([network, objective])

    @property
    def finite(self) -> bool:
        """Whether all weights that learn are."""
        return all(bool(one.isfinite().all()) for one in self.all.parameters() if one.requires_grad)

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.zero_grad(set_to_none=True)

    def step(self, rate: float, *, step: int, total: int) -> None:
        """Change all weights by the gradients that they have, the network's at this rate."""
        for companion in self.companions:
            companion.before_step(step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.own is not None:
            self.own.step()
        for companion in self.companions:
            companion.after_step(step, total)

    def snapshot(self, *, name: str, step: int, progress: dict[str, Any]) -> Checkpoint:
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
        for number, companion in enumerate(self.companions):
            weights |= {f"{COMPANION}{number}/{key}": value for key, value in companion.state().items()}
        return Checkpoint(
            name=name, step=step, weights=contiguous(weights), optimizer=contiguous(momentum | own), progress=progress
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from the state that snapshot() took."""
        load_state(self.network, _without(checkpoint.weights, OWN, COMPANION))
        for key, parameter in self.network.named_parameters():
            self.optimizer.state.pop(parameter, None)
            if key in checkpoint.optimizer:
                buffer = torch.empty_like(parameter).copy_(checkpoint.optimizer[key])
                self.optimizer.state[parameter] = {"momentum_buffer": buffer}
        load_state(self.objective, _of(checkpoint.weights, OWN))
        if self.own is not None:
            states: dict[int, dict[str, Tensor]] = {}
            for name, value in _of(checkpoint.optimizer, OWN).items():
                number, key = name.split("/", 1)
                states.setdefault(int(number), {})[key] = value
            self.own.load_state_dict(self.own.state_dict() | {"state": states})
        for place, companion in enumerate(self.companions):
            companion.load(_of(checkpoint.weights, f"{COMPANION}{place}/"))


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _without(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
