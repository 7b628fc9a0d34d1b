"""The recipe that puts one dense convolution in the place of a whole block, such as a residual pair."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.features import take_norm
from distill.recipes.recipe import Cost, option
from distill.recipes.routes import Routes
from distill.recipes.whole_block import Form, WholeBlock, convolution_cost


@dataclass(frozen=True, kw_only=True)
class OneConv(WholeBlock):
    """A convolution, a batch norm, and a ReLU where the block gives nothing negative; with the block's stride.

    It starts as the block's shortcut: the middle of its kernel is the identity, or the teacher's pointwise projection.
    """

    kernel: int = option(3, "side of the convolution's kernel, odd")
    init: str = option("data", "first weights: data or teacher (the block's shortcut), or random")

    def layers(self, form: Form) -> nn.Sequential:
        conv = nn.Conv2d(
            form.inputs, form.outputs, self.kernel, stride=form.stride, padding=self.kernel // 2, bias=False
        )
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, norm=nn.BatchNorm2d(form.outputs))
        if form.relu:
            layers["relu"] = nn.ReLU()
        return nn.Sequential(layers)

    def predict(self, form: Form, before: int, after: int) -> Cost:
        return convolution_cost(self.kernel**2 * form.inputs * form.outputs, form.outputs, after)

    def adopt(
        self, layers: nn.Module, form: Form, routes: Routes, statistics: Mapping[str, InputStatistics] | None
    ) -> None:
        conv, norm = layers.get_submodule("conv"), layers.get_submodule("norm")
        assert isinstance(conv, nn.Conv2d)
        middle = conv.weight[:, :, self.kernel // 2, self.kernel // 2]
        if form.same:
            nn.init.dirac_(conv.weight)
        elif routes.shortcut:
            conv.weight.zero_()
            middle.copy_(routes.shortcut[0].conv.weight[:, :, 0, 0])
            take_norm(norm, routes.shortcut[0])
