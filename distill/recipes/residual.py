"""What recipes have in common that put a shortcut and three convolutions beside it in the place of a whole block."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.features import Features, adopt_features
from distill.recipes.recipe import Changes, Cost, option
from distill.recipes.routes import Routes
from distill.recipes.shortcut import Residual, adopt_shortcut, shortcut_cost
from distill.recipes.whole_block import Form, WholeBlock, convolution_cost, total


@dataclass(frozen=True, kw_only=True)
class ResidualBlock(WholeBlock):
    """A pointwise convolution to the inner width, a larger one that has the stride, and a pointwise one, each with a
    batch norm, ReLU between them; a shortcut; and a ReLU at the end where the block gives nothing negative.

    The shortcut starts from the teacher's projection, the layers before the last from the teacher's first ones (see
    features.py); the last is random until it is fitted to what is missing from the block's output.
    """

    kernel: int = option(3, "side of the middle convolution's kernel, odd")
    align: int = option(8, "what the inner width is a multiple of")
    init: str = option("data", "first weights: data (what flows into the block too), teacher (its layers) or random")

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

    def wants(self, changes: Changes) -> list[str]:
        """The dense convolution that the block starts with: what it sees tells how its factors' outputs spread."""
        branch = changes["routes"]["branch"]
        return [branch[0][0]] if self.init == "data" and len(branch) == 1 else []

    def adopt(
        self, layers: nn.Module, form: Form, routes: Routes, statistics: Mapping[str, InputStatistics] | None
    ) -> None:
        assert isinstance(layers, Residual)
        adopt_shortcut(layers.shortcut, routes)
        body = layers.body
        student = Features(body.first, body.norm1, body.spatial, body.norm2)
        seen = (statistics or {}).get(routes.branch[0].path) if len(routes.branch) == 1 else None
        adopt_features(student, routes, seen)
