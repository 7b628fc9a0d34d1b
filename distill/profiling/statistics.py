"""What flows into layers: mean and covariance of their unfolded inputs, from which first weights can be computed.

A convolution sees its input as rows, one for every output pixel: a patch of its channels, in the order of its kernel
(channel, height, width). A linear layer sees every position of its input as a row. Sums are in float64, batch after
batch, so that they do not depend on who gathers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class InputStatistics:
    """Of one layer: `mean` (d) and `covariance` (d, d) of the rows that it sees, float64 on the CPU, over `rows` of
    them; d is the number of its weights for one output. `norm` is the path of the batch norm whose input is exactly
    this layer's output, where there is one."""

    mean: Tensor
    covariance: Tensor
    rows: int
    norm: str | None = None


def gather(
    layers: Mapping[str, nn.Module], batches: Iterable[Tensor], run: Callable[[Tensor], object]
) -> dict[str, InputStatistics]:
    """Return the statistics of every layer's input by its name, while `run` is called with every batch.

    Layers are nn.Conv2d without groups and nn.Linear; d x d numbers are kept of each. Raises TypeError for others.
    """
    sums = {name: _Sums(layer) for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(sums[name].add) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: one.finished() for name, one in sums.items()}


class _Sums:
    def __init__(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            raise TypeError(f"statistics are of the inputs of nn.Linear and dense nn.Conv2d, not of {layer}")
        self._layer = layer
        width = layer.weight[0].numel()
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)
        self._rows = 0

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = _rows(self._layer, inputs[0]).double()
        self._sum += rows.sum(0).cpu()
        self._products += (rows.T @ rows).cpu()
        self._rows += len(rows)

    def finished(self) -> InputStatistics:
        mean = self._sum / max(1, self._rows)
        covariance = self._products / max(1, self._rows) - torch.outer(mean, mean)
        return InputStatistics(mean, covariance, self._rows)


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the rows (positions, d) that a layer sees in its input."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(x.float(), layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
