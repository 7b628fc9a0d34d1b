"""The shortcut beside the layers that take a block's place: what of its input enters its output as it is."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from distill.recipes.features import take_norm
from distill.recipes.recipe import Cost
from distill.recipes.routes import Routes
from distill.recipes.whole_block import Form, convolution_cost


class Residual(nn.Module):
    """A body beside a shortcut, their sum, and a ReLU where the block is never negative.

    Source: He, Zhang, Ren, Sun 2016, "Deep residual learning for image recognition" (arXiv:1512.03385).
    """

    def __init__(self, form: Form, body: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut(form)
        self.body = body
        self.last = nn.ReLU() if form.relu else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # The shortcut runs first: the linear layer that runs last is the one that is fitted to the teacher's output.
        past = self.shortcut(x_BCHW)
        result: Tensor = self.last(past + self.body(x_BCHW))
        return result


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


def adopt_shortcut(layers: nn.Module, routes: Routes) -> None:
    """Give a shortcut's convolution and batch norm the weights of the teacher's, if both have them."""
    if isinstance(layers, nn.Sequential) and routes.shortcut:
        theirs = routes.shortcut[0]
        layers.conv.weight.copy_(theirs.conv.weight)
        take_norm(layers.norm, theirs)
