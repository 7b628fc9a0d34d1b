"""The recipe that puts one dense convolution in the place of a whole block, such as a residual pair."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from distill.recipes.recipe import Cost
from distill.recipes.whole_block import Convolving, Form, convolution_cost


@dataclass(frozen=True, kw_only=True)
class OneConv(Convolving):
    """A convolution, a batch norm, and a ReLU where the block gives nothing negative; with the block's stride."""

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

    def pass_on(self, layers: nn.Module) -> None:
        # What is fitted stays near where it begins, in directions that few images show: better random than off.
        if self.init == "teacher":
            nn.init.dirac_(layers.get_submodule("conv").weight)  # type: ignore[arg-type]
