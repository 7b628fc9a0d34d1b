"""The first paper's recipe: two depthwise-separable convolutions with ReLU each in the place of one convolution."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from distill.recipes.convolutions import ConvolutionRecipe
from distill.recipes.least_squares import Flow
from distill.recipes.recipe import Cost, among, count, option


@dataclass(frozen=True, kw_only=True)
class SeparableX2(ConvolutionRecipe):
    """depthwise-pointwise-ReLU twice; stride and dilation in the first depthwise, bias in both pointwise layers.

    Source: Blakeney, Li, Yan, Zong 2021, "Parallel blockwise knowledge distillation for deep neural network
    compression", section III (arXiv:2012.03096). Note that the second ReLU makes outputs non-negative, as theirs are:
    the recipe fits networks whose convolutions are followed by ReLU.
    """

    needs_output: ClassVar[bool] = True  # of its last ReLU; in VGG another ReLU follows, which works in place

    rank: int = option(1, "depthwise filters per channel", count)
    init: str = option("random", "first weights: random", among("random"))

    def build(self, conv: nn.Conv2d) -> nn.Sequential:
        same = [size // 2 for size in conv.kernel_size]
        channels, out = conv.in_channels, conv.out_channels
        first = nn.Conv2d(
            channels,
            channels * self.rank,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=channels,
            bias=False,
            padding_mode=conv.padding_mode,
        )
        second = nn.Conv2d(out, out * self.rank, conv.kernel_size, padding=same, groups=out, bias=False)  # type: ignore[arg-type]
        return nn.Sequential(
            OrderedDict(
                depthwise1=first,
                pointwise1=nn.Conv2d(channels * self.rank, out, 1),
                relu1=nn.ReLU(),
                depthwise2=second,
                pointwise2=nn.Conv2d(out * self.rank, out, 1),
                relu2=nn.ReLU(),
            )
        )

    def predict(self, conv: nn.Conv2d, pixels: int) -> Cost:
        taps, out = conv.kernel_size[0] * conv.kernel_size[1], conv.out_channels
        weights = self.rank * (conv.in_channels + out) * (taps + out)
        return Cost(weights + 2 * out, 2 * weights * pixels)

    def initialize(
        self,
        replacement: nn.Module,
        conv: nn.Conv2d,
        generator: torch.Generator,
        flow: Flow | None = None,
    ) -> None:
        for layer in replacement.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu", generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and all(size % 2 == 1 for size in getattr(module, "kernel_size", (0,)))
