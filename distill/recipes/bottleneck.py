"""The recipe that puts a bottleneck in the place of a whole block."""

from __future__ import annotations

from dataclasses import dataclass

from distill.recipes.recipe import option, share
from distill.recipes.residual import ResidualBlock
from distill.recipes.whole_block import Form
from distill.recipes.widths import aligned


@dataclass(frozen=True, kw_only=True)
class Bottleneck(ResidualBlock):
    """A pointwise convolution to few channels, a larger one among these, and a pointwise one back.

    Source: He, Zhang, Ren, Sun 2016, "Deep residual learning for image recognition", figure 5 (arXiv:1512.03385). We
    differ: the stride is in the larger convolution, as torchvision has it.
    """

    ratio: float = option(0.25, "inner width, as a share of the wider side", share)

    def width(self, form: Form) -> int:
        widest = max(form.inputs, form.outputs)
        return aligned(self.ratio * widest, widest, self.align)
