"""Fewer and fewer weights while a network is fine-tuned: the smallest become zero, and stay it. Knows no optimizer.

Source: Zhu, Gupta 2017, "To prune, or not to prune" (arXiv:1710.01878), whose schedule this is; Oguntola, Olubeko,
Sweeney 2018, "SlimNets" (arXiv:1808.00496), who prune what they have distilled. We differ: the teacher's loss stays on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.storage.packed import is_matrix
from distill.training.companions import Companion

UPDATES = 50  # times at most that weights are chosen anew between beginning and end: sorting millions takes a while


@dataclass(frozen=True)
class Ramp:
    """The share of weights that are zero, rising to `sparsity` between two shares of all steps, steeply at first: while
    there are many to spare, and time to make up for them."""

    sparsity: float
    begin: float
    end: float

    def at(self, step: int, total: int) -> float:
        """Return the share after step number `step` of `total`."""
        done, begin, end = step + 1, self.begin * total, self.end * total
        if done >= end:
            return self.sparsity
        if done <= begin:
            return 0.0
        # A staircase: between two of its steps weights are what they were.
        passed = int(UPDATES * (done - begin) / (end - begin)) / UPDATES
        return self.sparsity * (1 - (1 - passed) ** 3)


def prunable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that may become zero, those under several names once: matrices and kernels. Biases, batch
    norms, and whatever else there is one of for every channel are few, and each matters."""
    return {name: weight for name, weight in network.named_parameters() if is_matrix(weight)}


def smallest(values: Tensor, count: int) -> Tensor:
    """Return where the `count` smallest of non-negative values are (bool, of the same shape), the first of equals."""
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.flatten()
    limit = flat.kthvalue(count).values
    found = flat < limit
    ties = (flat == limit).nonzero().flatten()
    found[ties[: count - int(found.sum())]] = True
    return found.view_as(values)


def by_layer(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return where the smallest weights of each layer are, the same share of each."""
    return [smallest(weight.abs(), round(share * weight.numel())) for weight in weights]


def overall(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return where the weights are that count least in all layers together: by their squares, each in units of the sum
    of those of its layer that are no smaller. So a layer's scale, which a batch norm behind it makes meaningless, does
    not matter, and no layer loses all.

    Source: Lee, Park, Mo, Ahn, Shin 2021, "Layer-adaptive sparsity for the magnitude-based pruning" (arXiv:2010.07611).
    """
    scores = torch.cat([_relative_squares(weight.flatten()) for weight in weights])
    chosen = smallest(scores, round(share * len(scores)))
    parts = torch.split(chosen, [weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def _relative_squares(weight: Tensor) -> Tensor:
    squares, order = weight.double().square().sort(descending=True, stable=True)
    sums = squares.cumsum(0)
    found = torch.empty_like(squares)
    found[order] = squares / sums.clamp_min(torch.finfo(torch.float64).tiny)
    return found


SCOPES = {"layer": by_layer, "global": overall}


class Sparsity(Companion):
    """Makes a share of a network's weights zero. What is zero stays it, whatever momentum and decay do: gradients are
    masked before a step, and weights behind it. Which ones go follows from weights alone: ranks whose weights are the
    same choose the same.
    """

    def __init__(self, network: nn.Module, ramp: Ramp, scope: str) -> None:
        self._weights = prunable(network)
        if not self._weights:
            raise DistillError("finetune.sparsity: the student has no matrices of weights that could be sparse")
        self._ramp, self._choose = ramp, SCOPES[scope]
        self._asked = 0.0
        self._gone: dict[str, Tensor] = {}
        self.load({})

    @property
    def share(self) -> float:
        """The share of the weights that are kept zero, of those that may be."""
        gone = sum(int(gone.sum()) for gone in self._gone.values())
        return gone / sum(weight.numel() for weight in self._weights.values())

    @property
    def complete(self) -> bool:
        """Whether as many are zero as are to be in the end."""
        return self._asked == self._ramp.sparsity

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        for name, weight in self._weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(self._gone[name], 0.0)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        self._make_zero()
        asked = self._ramp.at(step, total)
        if asked > self._asked:  # never less: what has gone has lost its value
            self._asked = asked
            chosen = self._choose([weight.detach() for weight in self._weights.values()], asked)
            for gone, more in zip(self._gone.values(), chosen, strict=True):
                gone.logical_or_(more)
            self._make_zero()

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Means of weights over steps, which others put in their place, are made zero too."""
        with torch.no_grad():
            self._make_zero()
        yield

    def _make_zero(self) -> None:
        for name, weight in self._weights.items():
            weight.masked_fill_(self._gone[name], 0.0)

    def state(self) -> dict[str, Tensor]:
        asked = torch.tensor(self._asked, dtype=torch.float64)
        return {"asked": asked} | {f"gone/{name}": gone for name, gone in self._gone.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._asked = float(state.get("asked", 0.0))
        self._gone = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self._weights.items()}
        for name, gone in self._gone.items():
            if f"gone/{name}" in state:
                gone.copy_(state[f"gone/{name}"])
