"""The recipe that leaves a whole block out."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from distill.recipes.recipe import Cost
from distill.recipes.whole_block import Form, WholeBlock, convolution_cost


@dataclass(frozen=True, kw_only=True)
class Skip(WholeBlock):
    """The identity where the block's input has its output's shape; else a pooled pointwise projection, and a ReLU where
    the block gives nothing negative.

    Source: Veit, Wilber, Belongie 2016, "Residual networks behave like ensembles of relatively shallow networks"
    (arXiv:1605.06431): removing a residual block changes little.
    """

    replaces: ClassVar[str] = "blocks that are one module, from images to images"

    def layers(self, form: Form) -> nn.Module:
        layers = shortcut(form)
        if form.relu and isinstance(layers, nn.Sequential):
            layers.add_module("relu", nn.ReLU())
        return layers

    def predict(self, form: Form, before: int, after: int) -> Cost:
        return shortcut_cost(form, after)

    def pass_on(self, layers: nn.Module) -> None:
        open_shortcut(layers)


def shortcut(form: Form) -> nn.Module:
    """Return the identity where shapes allow; else the mean over the stride's pixels, a pointwise convolution and a
    batch norm.

    Source: He, Zhang, Zhang, Zhang, Xie, Li 2019, "Bag of tricks", ResNet-D (arXiv:1812.01187): a pointwise convolution
    with a stride would leave most of its input unseen.
    """
    if form.same:
        return nn.Identity()
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if form.stride > 1:
        layers["pool"] = nn.AvgPool2d(form.stride)
    layers["conv"] = nn.Conv2d(form.inputs, form.outputs, 1, bias=False)
    layers["norm"] = nn.BatchNorm2d(form.outputs)
    return nn.Sequential(layers)


def shortcut_cost(form: Form, pixels: int) -> Cost:
    """Return what the shortcut costs, where its output has so many pixels."""
    return Cost(0, 0) if form.same else convolution_cost(form.inputs * form.outputs, form.outputs, pixels)


def open_shortcut(layers: nn.Module) -> None:
    """Let a shortcut's projection, if there is one, pass as many channels on as it can."""
    if isinstance(layers, nn.Sequential):
        nn.init.dirac_(layers.get_submodule("conv").weight)  # type: ignore[arg-type]
