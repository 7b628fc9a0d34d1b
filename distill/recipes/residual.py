"""What recipes have in common that put a shortcut and three convolutions beside it in the place of a whole block."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from distill.recipes.recipe import Cost, count, option
from distill.recipes.skip import open_shortcut, shortcut, shortcut_cost
from distill.recipes.whole_block import Convolving, Form, convolution_cost, total


@dataclass(frozen=True, kw_only=True)
class ResidualBlock(Convolving):
    """A pointwise convolution to the inner width, a larger one that has the stride, and a pointwise one, each with a
    batch norm, ReLU between them; a shortcut; and a ReLU at the end where the block gives nothing negative.

    With `init=data` the shortcut's projection and the last convolution are fitted to the block's output, in turn; the
    convolutions before are random. (Starting them from factors of the teacher's kernels gained about a tenth of
    the held-out error on ResNet-20's blocks.)
    """

    align: int = option(8, "what the inner width is a multiple of", count)

    @abstractmethod
    def width(self, form: Form) -> int:
        """Return the inner width."""

    def groups(self, width: int) -> int:
        """Return the groups of the middle convolution."""
        return 1

    def layers(self, form: Form) -> Residual:
        width = self.width(form)
        spatial = nn.Conv2d(
            width,
            width,
            self.kernel,
            stride=form.stride,
            padding=self.kernel // 2,
            groups=self.groups(width),
            bias=False,
        )
        body = OrderedDict(
            first=nn.Conv2d(form.inputs, width, 1, bias=False),
            norm1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(),
            spatial=spatial,
            norm2=nn.BatchNorm2d(width),
            relu2=nn.ReLU(),
            last=nn.Conv2d(width, form.outputs, 1, bias=False),
            norm3=nn.BatchNorm2d(form.outputs),
        )
        return Residual(form, nn.Sequential(body))

    def predict(self, form: Form, before: int, after: int) -> Cost:
        width = self.width(form)
        return total(
            shortcut_cost(form, after),
            convolution_cost(form.inputs * width, width, before),
            convolution_cost(self.kernel**2 * width**2 // self.groups(width), width, after),
            convolution_cost(width * form.outputs, form.outputs, after),
        )

    def pass_on(self, layers: nn.Module) -> None:
        assert isinstance(layers, Residual)
        open_shortcut(layers.shortcut)


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
        result: Tensor = self.last(self.shortcut(x_BCHW) + self.body(x_BCHW))
        return result
