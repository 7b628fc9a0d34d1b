"""The recipe that leaves a block as it is: for blocks that student.per_block names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.recipe import Changes, Cost, Kept, Recipe, View


@dataclass(frozen=True, kw_only=True)
class Keep(Recipe):
    """The teacher's block. It is not trained, and costs nothing but itself."""

    replaces: ClassVar[str] = "nothing"

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        return None, {}

    def cost(self, view: View, changes: Changes) -> Cost:
        raise NotImplementedError("a block that is kept has no student")

    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        return block

    def install(self, network: nn.Module, changes: Changes) -> None:
        """Nothing changes."""

    def paths(self, changes: Changes) -> list[str]:
        return []

    def suits(self, network: nn.Module, *, first_layer: bool) -> bool:
        return False
