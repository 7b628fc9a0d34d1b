"""What flows into layers: mean and covariance of their unfolded inputs, from which first weights can be computed.

A convolution sees its input as rows, one for every output pixel: a patch of its channels, in the order of its kernel
(channel, height, width). A linear layer sees every position of its input as a row. Neighbouring rows say much the same,
so that of large images a lattice of them is taken, another one in every batch. Products are summed in float64, batch
after batch, so that they do not depend on who gathers them. Of layers with very many inputs there is a sketch of the
covariance, in bounded memory.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.profiling.sketch import Sketch, Sketching, rows_with_room

ENOUGH = 12  # rows of a batch for every number in one: more than that changes nothing that shows
FEWEST = 4096  # rows of a batch, for narrow layers
WIDEST = 8192  # inputs of an output: their covariance is half a GiB; of wider layers there is a sketch
OF_WIDE = 512  # rows of a batch, for those: a sketch has no more directions than rows


@dataclass(frozen=True)
class InputStatistics:
    """Of one layer: `mean` (d) and `covariance` (d, d) of the rows that it sees, float64 on the CPU, over `rows` of
    them; d is the number of its weights for one output, above WIDEST of which the covariance is a sketch. `norm` is the
    path of the batch norm whose input is just what the layer gives; None where there is none."""

    mean: Tensor
    covariance: Tensor | Sketch
    rows: int
    norm: str | None = None


def gather(
    layers: Mapping[str, nn.Module],
    batches: Iterable[Tensor],
    run: Callable[[Tensor], object],
    norms: Mapping[str, nn.Module] | None = None,
) -> dict[str, InputStatistics]:
    """Return the statistics of every layer's input by its name, while `run` is called with every batch; `norms` are
    the batch norms that may stand behind.

    Layers are nn.Conv2d without groups and nn.Linear; bytes_for() each are kept. Raises TypeError for others.
    """
    sums = {name: _Watch(layer) for name, layer in layers.items()}
    hooks = [layer.register_forward_hook(sums[name].add) for name, layer in layers.items()]
    for path, norm in (norms or {}).items():

        def meet(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
            for one in sums.values():
                one.meet(path, inputs[0])

        hooks.append(norm.register_forward_pre_hook(meet))
    try:
        with torch.no_grad():
            for batch in batches:
                run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: one.finished() for name, one in sums.items()}


class _Watch:
    """Sums over what one layer gets."""

    def __init__(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            raise TypeError(f"statistics are of the inputs of nn.Linear and dense nn.Conv2d, not of {layer}")
        self._layer = layer
        width = layer.weight[0].numel()
        self._sums: Products | Sketching = Sketching(width) if width > WIDEST else Products(width)
        self._calls = 0
        self._output: Callable[[], Tensor | None] = lambda: None
        self._norm: str | None = None

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._sums.add(rows_of(self._layer, inputs[0], turn=self._calls)[0].float())
        self._calls += 1
        self._output = weakref.ref(output)

    def meet(self, path: str, x: Tensor) -> None:
        """See what a batch norm gets."""
        if x is self._output():
            self._norm = path

    def finished(self) -> InputStatistics:
        return InputStatistics(self._sums.mean, self._sums.covariance, self._sums.rows, self._norm)


class Products:
    """The sums that mean and covariance of rows of `width` numbers follow from."""

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)
        self.rows = 0

    def add(self, rows: Tensor) -> None:
        """Take rows (n, width) in."""
        self._sum += rows.sum(0).double().cpu()
        # A batch in float32, many times as fast: its rounding is far below the sample's error.
        self._products += (rows.T @ rows).double().cpu()
        self.rows += len(rows)

    @property
    def mean(self) -> Tensor:
        return self._sum / max(1, self.rows)

    @property
    def covariance(self) -> Tensor:
        return self._products / max(1, self.rows) - torch.outer(self.mean, self.mean)


def bytes_for(width: int) -> int:
    """Return the memory that the statistics of a layer with so many inputs of an output take."""
    return 8 * width * (2 * rows_with_room(width) if width > WIDEST else width)


def rows_of(layer: nn.Module, x: Tensor, *, turn: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return rows (n, d) that a layer sees in its input `x`, all of them or those on the lattice whose turn it is, and
    what picks the same positions of a tensor in the form of its output, as rows (n, D)."""
    if not isinstance(layer, nn.Conv2d):
        rows = x.reshape(-1, x.shape[-1])
        step = max(1, len(rows) // _wanted(rows.shape[1]))
        return rows[turn % step :: step], lambda y: y.reshape(-1, y.shape[-1])[turn % step :: step]
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    reach = [(size - 1) * step + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    height, width = ((n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, layer.stride, strict=True))
    if min(height, width) < 1:  # the layer pads in its own code
        return x.new_empty(0, layer.weight[0].numel()), lambda y: y.new_empty(0, y.shape[1])
    wanted = _wanted(layer.weight[0].numel())
    apart = min(height, width, max(1, math.isqrt(len(x) * height * width // wanted)))
    down, right = divmod(turn % apart**2, apart)
    crop = x[:, :, down * layer.stride[0] :, right * layer.stride[1] :].float()
    strides = (apart * layer.stride[0], apart * layer.stride[1])
    patches = F.unfold(crop, layer.kernel_size, dilation=layer.dilation, stride=strides)

    def pick(y: Tensor) -> Tensor:
        return y[:, :, down::apart, right::apart].permute(0, 2, 3, 1).reshape(-1, y.shape[1])

    return patches.transpose(1, 2).reshape(-1, patches.shape[1]), pick


def _wanted(width: int) -> int:
    if width > WIDEST:
        return OF_WIDE
    return max(FEWEST, ENOUGH * width)
