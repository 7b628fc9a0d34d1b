"""The recipe that puts an inverted residual in the place of a whole block."""

from __future__ import annotations

from dataclasses import dataclass

from distill.recipes.recipe import option
from distill.recipes.residual import ResidualBlock
from distill.recipes.whole_block import Form


@dataclass(frozen=True, kw_only=True)
class Inverted(ResidualBlock):
    """A pointwise convolution to more channels, one filter for each of them, and a linear pointwise convolution back.

    Source: Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "MobileNetV2: inverted residuals and linear bottlenecks"
    (arXiv:1801.04381). We differ: ReLU for ReLU6, and a shortcut also where shapes differ.
    """

    expand: float = option(2.0, "inner width, as a multiple of the input's")

    def width(self, form: Form) -> int:
        return self.align * max(1, round(self.expand * form.inputs / self.align))

    def groups(self, width: int) -> int:
        return width
