"""The recipe that makes two or three thinner layers in a row of one, started from its kernel and what flows into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from distill.errors import ConfigError
from distill.recipes.factors import (
    CHANNEL,
    FORMS,
    SPATIAL,
    TUCKER,
    Factors,
    full_ranks,
    ranks_of_energy,
    ranks_of_ratio,
)
from distill.recipes.layers import LayerRecipe
from distill.recipes.least_squares import Flow
from distill.recipes.plain import Layer
from distill.recipes.recipe import INIT, Changes, Kept, View, among, count, option, share
from distill.recipes.replacement import Replacing
from distill.recipes.selection import ways_of
from distill.recipes.widths import aligned

NARROW = 16  # channels at most that stay all: fewer save next to nothing, and a classifier of ten needs its ten
WIDE = 256  # channels from which tucker loses no more than spatial does with as many weights, on real covariances


@dataclass(frozen=True, kw_only=True)
class LowRank(LayerRecipe):
    """Factors of every dense convolution, 1 x 1 too, and of every linear layer that they make cheaper."""

    replaces: ClassVar[str] = "dense convolutions or linear layers"

    form: str = option(
        CHANNEL,
        "channel (k x k, then 1 x 1), spatial (k x 1, then 1 x k) or tucker (that, where wide: three)",
        among(*FORMS),
    )
    ratio: float = option(0.5, "share of a layer's weights that its factors have, as nearly as align lets them", share)
    energy: float | None = option(
        None, "share of a kernel's squared singular values that its factors keep, for a ratio", share
    )
    rank: int | None = option(None, "channels between the factors, for every layer, instead of a ratio", count)
    align: int = option(8, "what channels between the factors are a multiple of", count)
    init: str = option("data", "first weights: data (what flows into it), teacher (its kernel alone) or random", INIT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy is not None and self.rank is not None:
            raise ConfigError("student.options.energy", self.energy, "null, beside a rank; or no rank")

    def wanted(self, view: View) -> list[str]:
        layers = [path for path, module in view.module.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        return [path for path in layers if path in view.changeable]

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        changes, kept = super().propose(view)
        return changes, kept | _others(view)

    def changes(self, view: View, paths: tuple[str, ...]) -> Changes:
        ways = ways_of(view.module, paths, self)
        layers = {path: {"form": way.form, "ranks": list(way.ranks)} for path, way in ways.items()}  # type: ignore[attr-defined]
        return {"layers": layers}

    def ways(self, changes: Changes) -> dict[str, Replacing]:
        return {
            path: Factors(form=layer["form"], ranks=tuple(layer["ranks"]), init=self.init)
            for path, layer in changes["layers"].items()
        }

    def wants(self, changes: Changes) -> list[str]:
        return list(changes["layers"]) if self.init == "data" else []

    def suits(self, network: nn.Module, *, first_layer: bool) -> bool:
        fitting = [module for module in network.modules() if self.fits(module)]
        first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
        return any(first_layer or module is not first for module in fitting)

    # What is done with one layer is for its factors to do.

    def sized(self, layer: Layer) -> Factors:
        form = self._form_of(layer)
        full = full_ranks(layer, form)
        wanted = zip(self._wanted_ranks(layer, form), full, strict=True)
        ranks = [most if most <= NARROW else aligned(rank, most, self.align) for rank, most in wanted]
        return Factors(form=form, ranks=tuple(ranks), init=self.init)

    def _form_of(self, layer: Layer) -> str:
        if isinstance(layer, nn.Linear) or min(layer.kernel_size) == 1:
            return CHANNEL
        narrow = min(layer.in_channels, layer.out_channels) < WIDE
        return SPATIAL if self.form == TUCKER and narrow else self.form

    def _wanted_ranks(self, layer: Layer, form: str) -> tuple[float, ...]:
        if self.rank is not None:
            return (self.rank,) * len(full_ranks(layer, form))
        if self.energy is None:
            return ranks_of_ratio(layer, form, self.ratio)
        if layer.weight.is_meta:
            needed = "null, and a ratio or a rank, where a network is imagined: energy is that of its weights"
            raise ConfigError("student.options.energy", self.energy, needed)
        return ranks_of_energy(layer, form, self.energy)

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)

    def build(self, layer: Layer) -> nn.Module:
        return self.sized(layer).build(layer)

    def initialize(
        self, replacement: nn.Module, layer: Layer, generator: torch.Generator, flow: Flow | None = None
    ) -> None:
        self.sized(layer).initialize(replacement, layer, generator, flow)


def _others(view: View) -> Kept:
    """Return the modules of a block with matrices of weights that are neither convolutions nor linear layers."""
    modules = dict(view.module.named_modules())
    layers = [module for module in modules.values() if isinstance(module, nn.Conv2d | nn.Linear)]
    inside = {part for layer in layers for part in layer.modules()}  # also what normalises a kernel
    kept: Kept = {}
    for path, module in modules.items():
        own = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
        matrices = [weight for weight in own if min(len(weight), weight[0].numel()) > 1]
        if path in view.changeable and matrices and module not in inside:
            reader = "the network" if type(module) is nn.Module else f"a {type(module).__name__}"
            kept[path] = f"{reader} reads its weights and runs no layer with them"
    return kept
