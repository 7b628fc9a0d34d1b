"""A recipe from outside whose students have no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from distill.profiling.statistics import InputStatistics
from distill.recipes import Changes, Cost, Kept, Recipe, View


@dataclass(frozen=True, kw_only=True)
class Shortcut(Recipe):
    """Nothing in the place of a block."""

    replaces: ClassVar[str] = "blocks that keep the shape"

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        same = view.module.eval()(view.sample).shape == view.sample.shape
        return ({"module": view.path}, {}) if same and view.path else (None, {view.name: "its shape changes"})

    def cost(self, view: View, changes: Changes) -> Cost:
        return Cost(0, 0)

    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        return nn.Identity()

    def install(self, network: nn.Module, changes: Changes) -> None:
        network.set_submodule(changes["module"], nn.Identity())

    def paths(self, changes: Changes) -> list[str]:
        return [changes["module"]]
