"""The recipe that leaves a whole block out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.recipe import Cost, option
from distill.recipes.routes import Routes
from distill.recipes.shortcut import adopt_shortcut, shortcut, shortcut_cost
from distill.recipes.whole_block import Form, WholeBlock


@dataclass(frozen=True, kw_only=True)
class Skip(WholeBlock):
    """The identity where the block's input has its output's shape; else a pooled pointwise projection, which starts
    from the teacher's, and a ReLU where the block gives nothing negative.

    Source: Veit, Wilber, Belongie 2016, "Residual networks behave like ensembles of relatively shallow networks"
    (arXiv:1605.06431): removing a residual block changes little.
    """

    replaces: ClassVar[str] = "blocks that are one module, from images to images"

    init: str = option("data", "first weights of projections: data or teacher (the block's own projection), or random")

    def layers(self, form: Form) -> nn.Module:
        layers = shortcut(form)
        if form.relu and isinstance(layers, nn.Sequential):
            layers.add_module("relu", nn.ReLU())
        return layers

    def predict(self, form: Form, before: int, after: int) -> Cost:
        return shortcut_cost(form, after)

    def adopt(
        self, layers: nn.Module, form: Form, routes: Routes, statistics: Mapping[str, InputStatistics] | None
    ) -> None:
        adopt_shortcut(layers, routes)
