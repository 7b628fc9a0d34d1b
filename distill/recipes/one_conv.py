"""The recipe that puts one dense convolution in the place of a whole block, such as a residual pair."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill.profiling.flops import module_flops
from distill.profiling.statistics import InputStatistics
from distill.recipes.recipe import Changes, Cost, Kept, Recipe, View, option


@dataclass(frozen=True, kw_only=True)
class OneConv(Recipe):
    """A convolution, a batch norm, and a ReLU where the block gives nothing negative; with the block's stride."""

    replaces: ClassVar[str] = "blocks of several layers that are one module, from images to images"

    kernel: int = option(3, "side of the convolution's kernel, odd")

    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        with torch.no_grad():
            y = view.module.eval()(view.sample.float())
        reason = self._objection(view, y)
        if reason is not None:
            return None, {view.name: reason}
        x = view.sample
        # On the meta device there are no values to judge by.
        relu = y.device.type != "meta" and bool((y >= 0).all())
        changes = {
            "module": view.path,
            "channels": [x.shape[1], y.shape[1]],
            "stride": x.shape[2] // y.shape[2],
            "relu": relu,
        }
        before = Cost(_params(view.module), module_flops(view.module, x[:1]))
        after = self.cost(view, changes)
        if after.params > before.params:
            return None, {view.name: f"its replacement would have {after.params:,} parameters for {before.params:,}"}
        if after.flops > before.flops:
            return None, {view.name: f"its replacement would take {after.flops:,} FLOPs an image for {before.flops:,}"}
        return changes, {}

    def _objection(self, view: View, y: Tensor) -> str | None:
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

    def cost(self, view: View, changes: Changes) -> Cost:
        before, after = changes["channels"]
        weights, norm = self.kernel**2 * before * after, 2 * after
        side = [size // changes["stride"] for size in view.sample.shape[2:]]
        return Cost(weights + norm, 2 * weights * side[0] * side[1])

    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        layers = self._layers(changes)
        if generator is not None:
            nn.init.kaiming_normal_(layers[0].weight, nonlinearity="relu", generator=generator)  # type: ignore[arg-type]
        first = next(block.parameters())
        return Placed(changes["module"], layers).to(first.device, first.dtype).train(block.training)

    def install(self, network: nn.Module, changes: Changes) -> None:
        old = network.get_submodule(changes["module"])
        first = next(old.parameters())
        layers = self._layers(changes).to(first.device, first.dtype)
        network.set_submodule(changes["module"], layers.train(old.training))

    def paths(self, changes: Changes) -> list[str]:
        return [changes["module"]]

    def _layers(self, changes: Changes) -> nn.Sequential:
        before, after = changes["channels"]
        conv = nn.Conv2d(before, after, self.kernel, stride=changes["stride"], padding=self.kernel // 2, bias=False)
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, norm=nn.BatchNorm2d(after))
        if changes["relu"]:
            layers["relu"] = nn.ReLU()
        return nn.Sequential(layers)


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


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
