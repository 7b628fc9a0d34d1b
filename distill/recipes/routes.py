"""The two routes of a block from its input: the branch that computes, and the shortcut that passes it by.

What takes a whole block's place starts from the layers at the beginning of these, since they alone see what it sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.recipes.least_squares import matrix, scale_of
from distill.recipes.plain import OddConvolutionError, plain_form


@dataclass(frozen=True)
class Layer:
    """A convolution of the teacher's, and the batch norm that reads what it gives, if there is one."""

    path: str
    conv: nn.Conv2d
    norm_path: str | None
    norm: _BatchNorm | None

    @property
    def kernel(self) -> Tensor:
        """Its weight times what the batch norm multiplies it by, float64 on the CPU."""
        weight = matrix(self.conv.weight).view(self.conv.weight.shape)
        return weight if self.norm is None else scale_of(self.norm).view(-1, 1, 1, 1) * weight

    @property
    def means_of_norm(self) -> Tensor:
        """The means of what it gives, as far as its batch norm tells them."""
        if self.norm is None:
            return torch.zeros(self.conv.out_channels, dtype=torch.float64)
        return self.norm.bias.detach().cpu().double()

    def means(self, mean: Tensor) -> Tensor:
        """Return the means of what it gives, behind the batch norm, for its unfolded inputs' means."""
        means = matrix(self.conv.weight) @ mean
        if self.conv.bias is not None:
            means += self.conv.bias.cpu().double()
        if self.norm is None:
            return means
        assert self.norm.running_mean is not None
        return scale_of(self.norm) * (means - self.norm.running_mean.cpu().double()) + self.norm.bias.cpu().double()


@dataclass(frozen=True)
class Routes:
    """`branch`: the dense convolution that the branch starts with, and where that is pointwise the larger one behind it
    that reads as many channels; `shortcut`: its pointwise convolution. Empty where the block has no such thing."""

    branch: Sequence[Layer]
    shortcut: Sequence[Layer]

    @property
    def paths(self) -> dict[str, list[list[str | None]]]:
        """The layers' paths and their batch norms', as JSON values."""
        routes = {"branch": self.branch, "shortcut": self.shortcut}
        return {name: [[one.path, one.norm_path] for one in layers] for name, layers in routes.items()}

    @classmethod
    def seen(cls, block: nn.Module, x: Tensor) -> Routes:
        """Find the routes of a block in eval mode by watching which layers get its input `x`."""
        calls = _Calls.of(block, x)
        starts = [at for at, call in enumerate(calls.made) if call.x is x and _is_dense(call.module)]
        across = [
            at
            for at in starts
            if len(starts) > 1 and _is_pointwise(calls.made[at].module) and calls.made[at].y.shape == calls.output.shape
        ]
        ahead = [at for at in starts if at not in across[:1]][:1]
        if ahead and _is_pointwise(calls.made[ahead[0]].module):
            ahead += calls.larger_behind(ahead[0])
        return cls.read(block, {"branch": calls.pairs(ahead), "shortcut": calls.pairs(across[:1])})

    @classmethod
    def read(cls, block: nn.Module, paths: Mapping[str, Sequence[Sequence[str | None]]]) -> Routes:
        """Return the routes whose `paths` are known; those whose layers compute odd things count as empty."""
        return cls(*(_read(block, paths[name]) for name in ("branch", "shortcut")))


def _read(block: nn.Module, pairs: Sequence[Sequence[str | None]]) -> list[Layer]:
    layers = []
    for path, norm_path in pairs:
        assert path is not None
        conv, norm = block.get_submodule(path), None if norm_path is None else block.get_submodule(norm_path)
        assert isinstance(conv, nn.Conv2d)
        assert norm is None or isinstance(norm, _BatchNorm)
        try:
            layers.append(Layer(path, plain_form(conv).conv, norm_path, norm))
        except OddConvolutionError:
            return []
    return layers


@dataclass
class _Call:
    path: str
    module: nn.Module
    x: Tensor
    y: Tensor


@dataclass
class _Calls:
    """What a block's convolutions and batch norms were given and gave, in the order of use."""

    made: list[_Call] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    @torch.no_grad()
    def of(cls, block: nn.Module, x: Tensor) -> _Calls:
        found = cls()
        hooks = []
        for path, module in block.named_modules():
            if not isinstance(module, nn.Conv2d | _BatchNorm):
                continue

            def hear(module: nn.Module, args: tuple[Any, ...], y: Tensor, path: str = path) -> None:
                found.made.append(_Call(path, module, args[0], y))

            hooks.append(module.register_forward_hook(hear))
        try:
            found.output = block(x)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def larger_behind(self, first: int) -> list[int]:
        """Return the next convolution, where it is larger than a pixel and reads as many channels, in one group or in
        as many groups as channels."""
        channels = self.made[first].y.shape[1]
        for at in range(first + 1, len(self.made)):
            conv = self.made[at].module
            if isinstance(conv, nn.Conv2d):
                fits = conv.in_channels == channels and conv.groups in (1, channels) and not _is_pointwise(conv)
                return [at] if fits and conv.out_channels % conv.groups == 0 else []
        return []

    def pairs(self, calls: Sequence[int]) -> list[list[str | None]]:
        return [[self.made[at].path, self._norm_behind(self.made[at])] for at in calls]

    def _norm_behind(self, call: _Call) -> str | None:
        for other in self.made:
            norm = other.module
            if isinstance(norm, _BatchNorm) and other.x is call.y and norm.affine and norm.running_mean is not None:
                return other.path
        return None


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
