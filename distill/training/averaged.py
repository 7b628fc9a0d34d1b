"""The moving average of a network's weights, which is judged and kept in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.training.companions import Companion

WARM_UP = 10  # steps: the average begins as one over few, not as the first weights that would stay in it for long


class Averaged(Companion):
    """An exponential moving average of the weights of `network`, and of the running statistics of its batch norms: the
    last ones belong to other weights, and averaging costs nothing where estimating them again takes passes of batches.
    In the precision of the weights, fp32 where passes are in bf16.

    Source: Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the exponential form and the
    decay min(decay, (1 + step) / (10 + step)) are those of tf.train.ExponentialMovingAverage.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network, self._decay = network, decay
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        own = self._own()
        if not self._average:
            self._average = {name: tensor.clone() for name, tensor in own.items()}
            return
        weight = 1 - min(self._decay, (1 + step) / (WARM_UP + step))
        torch._foreach_lerp_([*self._average.values()], [*own.values()], weight)

    @contextmanager
    def judged(self) -> Iterator[None]:
        own = self._own()
        kept = {name: tensor.clone() for name, tensor in own.items()}
        _put(self._average, own)
        try:
            yield
        finally:
            _put(kept, own)

    def state(self) -> dict[str, Tensor]:
        return dict(self._average)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._average = {name: own.clone().copy_(state[name]) for name, own in self._own().items() if name in state}

    def _own(self) -> dict[str, Tensor]:
        """Return what is averaged, each tensor once."""
        return {name: tensor.detach() for name, tensor in _named(self._network) if tensor.is_floating_point()}


def _named(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _put(values: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    for name, tensor in values.items():
        places[name].copy_(tensor)
