"""The recipe that puts an inverted residual in the place of a whole block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from distill.recipes.recipe import option
from distill.recipes.residual import ResidualBlock
from distill.recipes.whole_block import Form


def _expansion(value: float) -> str | None:
    return None if value > 0 else "a number above 0"


@dataclass(frozen=True, kw_only=True)
class Inverted(ResidualBlock):
    """A pointwise convolution to more channels, one filter for each of them, and a linear pointwise convolution back.

    Source: Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "MobileNetV2: inverted residuals and linear bottlenecks"
    (arXiv:1801.04381). We differ: ReLU for ReLU6, and a shortcut also where shapes differ.
    """

    expand: float = option(2.0, "inner width, as a multiple of the input's", _expansion)

    def width(self, form: Form) -> int:
        return self.align * max(1, round(self.expand * form.inputs / self.align))

    def groups(self, width: int) -> int:
        return width

    def pass_on(self, layers: nn.Module) -> None:
        """Open the shortcut; let the first convolution repeat its input, and most of that pass the ReLU behind."""
        super().pass_on(layers)
        first, norm = (layers.get_submodule(f"body.{name}") for name in ("first", "norm1"))
        assert isinstance(first, nn.Conv2d)
        repeated = torch.arange(first.out_channels) % first.in_channels
        with torch.no_grad():
            first.weight.copy_(torch.eye(first.in_channels)[repeated][:, :, None, None])
        nn.init.ones_(norm.bias)  # type: ignore[arg-type]
