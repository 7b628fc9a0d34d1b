"""Recipes that put another module in the place of a whole block, from images to images: what they have in common.

A block must be one module of the network, because what takes its place is put where that module is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.recipe import INIT, Changes, Cost, Kept, Recipe, View, option


@dataclass(frozen=True)
class Form:
    """From images of `inputs` channels to images of `outputs`, smaller by `stride`; `relu`: never negative."""

    inputs: int
    outputs: int
    stride: int
    relu: bool

    @classmethod
    def of(cls, changes: Changes) -> Form:
        inputs, outputs = changes["channels"]
        return cls(inputs, outputs, changes["stride"], changes["relu"])

    @property
    def same(self) -> bool:
        """Whether the input has the output's shape."""
        return self.inputs == self.outputs and self.stride == 1


@dataclass(frozen=True, kw_only=True)
class WholeBlock(Recipe):
    """Replaces a block by layers of its own, where they have neither more parameters nor more FLOPs."""

    replaces: ClassVar[str] = "blocks of several layers that are one module, from images to images"

    init: str = option(
        "data", "first weights: data (fitted to the block), teacher (its input, passed on), random", INIT
    )

    @property
    def regressed(self) -> bool:
        return self.init == "data"

    @abstractmethod
    def layers(self, form: Form) -> nn.Module:
        """Return the student, with PyTorch's weights."""

    @abstractmethod
    def predict(self, form: Form, before: int, after: int) -> Cost:
        """Return what the student costs where its input has `before` pixels and its output `after`."""

    def pass_on(self, layers: nn.Module) -> None:
        """Let layers that have random weights pass their input on, as the block's shortcut does, as far as they can."""

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        x = view.sample.float()
        with torch.no_grad():
            y = view.module.eval()(x)
        reason = _objection(view, y)
        if reason is not None:
            return None, {view.name: reason}
        changes = {
            "module": view.path,
            "channels": [x.shape[1], y.shape[1]],
            "stride": x.shape[2] // y.shape[2],
            # On the meta device there are no values to judge by.
            "relu": y.device.type != "meta" and bool((y >= 0).all()),
        }
        reason = self._misshapen(Form.of(changes), x, y) or self._too_large(view, changes)
        return (changes, {}) if reason is None else (None, {view.name: reason})

    def _misshapen(self, form: Form, x: Tensor, y: Tensor) -> str | None:
        with torch.device("meta"), torch.no_grad():
            found = self.layers(form).eval()(torch.empty(x.shape))
        shapes = tuple(found.shape[1:]), tuple(y.shape[1:])
        return None if shapes[0] == shapes[1] else f"its replacement would give {shapes[0]} for {shapes[1]}"

    def _too_large(self, view: View, changes: Changes) -> str | None:
        before, after = view.cost, self.cost(view, changes)
        same = "its replacement would be no cheaper" if after == before else None
        return after.more_than(before) or same

    def cost(self, view: View, changes: Changes) -> Cost:
        height, width = view.sample.shape[2:]
        form = Form.of(changes)
        return self.predict(form, height * width, (height // form.stride) * (width // form.stride))

    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        form = Form.of(changes)
        layers = self.layers(form)
        if generator is not None:
            for conv in (part for part in layers.modules() if isinstance(part, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
            if self.init != "random":
                self.pass_on(layers)
        first = next(block.parameters())
        return Placed(changes["module"], layers).to(first.device, first.dtype).train(block.training)

    def install(self, network: nn.Module, changes: Changes) -> None:
        old = network.get_submodule(changes["module"])
        first = next(old.parameters())
        layers = self.layers(Form.of(changes)).to(first.device, first.dtype)
        network.set_submodule(changes["module"], layers.train(old.training))

    def paths(self, changes: Changes) -> list[str]:
        return [changes["module"]]


def _odd(value: int) -> str | None:
    return None if value >= 1 and value % 2 == 1 else "an odd integer >= 1"


@dataclass(frozen=True, kw_only=True)
class Convolving(WholeBlock):
    """Has a convolution that looks around."""

    kernel: int = option(3, "side of the convolution's kernel, odd", _odd)


class Placed(nn.Module):
    """A module alone at its place in a network, so that its weights have the names that they have there."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self._path = path
        at: nn.Module = self
        *around, last = path.split(".")
        for name in around:
            at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        at.add_module(last, module)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(self._path)(x)
        return result


def convolution_cost(weights: int, channels: int, pixels: int) -> Cost:
    """Return the cost of a convolution without bias and the batch norm of so many channels behind it."""
    return Cost(weights + 2 * channels, 2 * weights * pixels)


def total(*costs: Cost) -> Cost:
    """Return what several things cost together."""
    return Cost(sum(one.params for one in costs), sum(one.flops for one in costs))


def _objection(view: View, y: Tensor) -> str | None:
    if view.path is None:
        return "the block is not one module of the network"
    inside = {name for name, module in view.module.named_modules() if any(True for _ in module.parameters(False))}
    if not inside <= view.changeable:
        return "a layer of the block is to stay"
    if view.sample.dim() != 4 or y.dim() != 4:
        return "the block is not from images to images"
    strides = [divmod(before, after) for before, after in zip(view.sample.shape[2:], y.shape[2:], strict=True)]
    if any(rest for _, rest in strides) or len(set(strides)) > 1:
        return "no one stride makes its output's size of its input's"
    return None
