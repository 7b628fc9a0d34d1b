"""The recipe that halves all of a block's convolutions, and restores the width of what they give by 1 x 1 ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from distill.blocks.tracing import UntraceableError
from distill.profiling.statistics import InputStatistics
from distill.recipes.channels import outer_layers
from distill.recipes.factors import CHANNEL, Factors
from distill.recipes.layers import LayerRecipe
from distill.recipes.lowrank import LowRank
from distill.recipes.plain import Layer
from distill.recipes.recipe import INIT, Changes, Cost, Kept, Recipe, View, count, option, share
from distill.recipes.thin import Thin
from distill.recipes.thin_start import left_of
from distill.recipes.widths import aligned


@dataclass(frozen=True, kw_only=True)
class Halved(Recipe):
    """Half the channels inside a block, as `thin` chooses them; of the layers that make its output half the filters,
    too, with a 1 x 1 convolution behind that restores the width, where that is cheaper. What passes by stays whole.

    Source: Wang, Zhao, Li, Tan 2018, "Progressive blockwise knowledge distillation for neural network acceleration"
    (IJCAI), section 3. We differ: the last filters are the best mixtures of the teacher's, not some of these, and
    nothing stands between them and the 1 x 1; both follow in closed form, as those of `lowrank` do.
    """

    replaces: ClassVar[str] = "convolutions or linear layers"

    ratio: float = option(0.5, "filters that stay, as a share of the layer's, above 0 and up to 1", share)
    align: int = option(8, "widths are multiples of it, where the teacher's are", count)
    init: str = option("data", "first weights: data, teacher or random", INIT)

    @property
    def _inner(self) -> Thin:
        return Thin(**asdict(self))

    @property
    def _outer(self) -> _Ends:
        return _Ends(**asdict(self))

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        inner, kept = self._inner.propose(view)
        inner = inner or {"groups": [], "statistics": []}
        outer, left = self._outer.propose(self._narrowed(view, inner))
        changes = {"inner": inner, "outer": outer or {"layers": {}}}
        return (changes if inner["groups"] or outer else None), kept | left

    def _narrowed(self, view: View, inner: Changes) -> View:
        """Return the block as it is when the channels inside are gone."""
        module = copy.deepcopy(view.module)
        self._inner.install(module, inner)
        return replace(view, module=module)

    def cost(self, view: View, changes: Changes) -> Cost:
        return self._outer.cost(self._narrowed(view, changes["inner"]), changes["outer"])

    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        inner, outer, known = changes["inner"], changes["outer"], statistics or {}
        kept = self._inner.narrow(block, inner, generator, known)
        seen = {path: left_of(known[path], block, path, kept) for path in outer["layers"] if path in known}
        return self._outer.student(block, outer, generator, seen)

    def install(self, network: nn.Module, changes: Changes) -> None:
        self._inner.install(network, changes["inner"])
        self._outer.install(network, changes["outer"])

    def paths(self, changes: Changes) -> list[str]:
        return list(dict.fromkeys([*self._inner.paths(changes["inner"]), *self._outer.paths(changes["outer"])]))

    def wants(self, changes: Changes) -> list[str]:
        return list(dict.fromkeys([*self._inner.wants(changes["inner"]), *self._outer.wants(changes["outer"])]))

    def unwatched(self, changes: Changes) -> list[str]:
        return self._inner.unwatched(changes["inner"])

    def suits(self, network: nn.Module, *, first_layer: bool) -> bool:
        return self._outer.suits(network, first_layer=first_layer)


class _Ends(LowRank):
    """Factors of the layers that make a block's output; their rank is a share of the outputs."""

    def wanted(self, view: View) -> list[str]:
        try:
            layers = outer_layers(view.module.eval(), view.sample.float())
        except UntraceableError:  # which was told of the channels inside
            return []
        return [path for path in layers if path in view.changeable]

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        return LayerRecipe.propose(self, view)

    def sized(self, layer: Layer) -> Factors:
        outputs = len(layer.weight)
        rank = aligned(self.ratio * outputs, outputs, self.align)
        return Factors(form=CHANNEL, ranks=(min(rank, layer.weight[0].numel()),), init=self.init)
