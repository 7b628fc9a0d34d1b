"""Small networks with one odd thing each, as people write them; test_odd_networks.py says what becomes of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

CLASSES, SIZE = 5, 8


def conv(inputs: int = 8, outputs: int = 8, kind: Callable[..., nn.Module] = nn.Conv2d, **options: Any) -> nn.Module:
    return kind(inputs, outputs, 3, **{"padding": 1, **options})


class Net(nn.Module):
    """A stem, whatever `middle` is, a convolution and a head; subclasses change one thing."""

    def __init__(self, *middle: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = conv(3)
        self.middle = nn.Sequential(*middle)
        self.last = conv(width)
        self.head = nn.Linear(8, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.stem(x).relu())).relu()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).mean((2, 3)))


class Same(nn.Conv2d):
    """TensorFlow's "same" padding."""

    def forward(self, x: Tensor) -> Tensor:
        sides = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        rest = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size, kernel, stride in sides]
        pads = [rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Padding(nn.Conv2d):
    """Overrides what forward() calls, and pads on one side only."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, (2, 0, 2, 0)), weight, bias)


class Activating(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Mixing(nn.Conv2d):
    """Its kernel depends on its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * x.mean(), self.bias)


class Named(nn.Conv2d):
    """Only its constructor is its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)


def hooked() -> nn.Module:
    network = Net(conv())
    network.last.register_forward_hook(lambda module, args, result: result * 2)
    return network


def heard() -> nn.Module:
    network = Net(conv())
    network.last.register_forward_hook(lambda module, args, result: None)
    return network


def with_weight_norm() -> nn.Module:
    return Net(parametrizations.weight_norm(conv()))


def with_spectral_norm() -> nn.Module:
    return Net(parametrizations.spectral_norm(conv()))


def with_old_weight_norm() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # PyTorch has another one now
        return Net(nn.utils.weight_norm(conv()))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_parametrization() -> nn.Module:
    network = Net(conv())
    parametrize.register_parametrization(network.last, "weight", Doubled())
    return network


def at_two_places() -> nn.Module:
    shared = conv()
    return Net(shared, nn.BatchNorm2d(8), nn.ReLU(), shared, nn.BatchNorm2d(8))


class Aliased(Net):
    """Its parts under two names, and the second one is used."""

    def __init__(self) -> None:
        super().__init__(conv(), nn.BatchNorm2d(8), nn.ReLU())
        self.features = nn.Sequential(self.stem, nn.ReLU(), *self.middle, self.last, nn.ReLU())

    def body(self, x: Tensor) -> Tensor:
        return self.features(x)


def tied() -> nn.Module:
    network = Net(conv(), nn.ReLU())
    network.last.weight = network.middle[0].weight
    return network


class Sliced(Net):
    """A buffer that is a part of another one, an expanded one, odd element types, an unused layer, no layer at all."""

    def __init__(self) -> None:
        super().__init__(conv())
        self.register_buffer("table", torch.arange(32.0))
        self.register_buffer("part", self.table[8:16])
        self.register_buffer("wide", torch.ones(1).expand(8))
        self.register_buffer("steps", torch.tensor(3, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool))
        self.register_buffer("waves", torch.ones(8, dtype=torch.complex64))
        self.register_buffer("small", torch.ones(8, dtype=torch.float16))
        self.counts = nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)
        self.cube = nn.Parameter(torch.zeros(1, 1, 1, 1, 8))
        self.absent: nn.Module | None = None
        self.register_module("none", None)
        self.unused = conv()

    def forward(self, x: Tensor) -> Any:
        x = self.body(x) * self.mask[:, None, None] + self.cube.reshape(8, 1, 1)
        return self.head((x.mean((2, 3)) + self.part + self.wide) * self.waves.real + self.small.float())


class Listed(Net):
    """A plain list holds a layer once more, and forward() reads the list: what is put in its place is not found."""

    def __init__(self) -> None:
        super().__init__(conv())
        self.again = [self.last]

    def body(self, x: Tensor) -> Tensor:
        return self.again[0](self.middle(self.stem(x).relu())).relu()


class Reading(Net):
    """Reads a weight without calling its layer."""

    def body(self, x: Tensor) -> Tensor:
        x = self.middle(self.stem(x).relu())
        return F.conv2d(x, self.last.weight, self.last.bias, padding=1).relu() + self.last(x)


class Sizes(Net):
    """Reads sizes in front of the layers and uses them behind, in one of the ways there are."""

    def __init__(self, way: str) -> None:
        super().__init__(conv(), nn.ReLU())
        self.way = way
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Any:
        n = x.size(0) if self.way == "size" else x.shape[0]
        b, _, h, w = x.shape
        y = self.body(x)
        if self.way == "unpacked":
            y = y.view(b, 8, h * w).mean(2).view(b, -1)
        elif self.way == "divided":
            y = y.reshape(n * 2, 4, h, w).mean((2, 3)).reshape(n, 2 * 4)
        elif self.way == "expanded":
            y = torch.cat((self.token.expand(n, -1, -1), y.flatten(2).transpose(1, 2)), 1).mean(1)
        elif self.way == "made":
            y = y.mean((2, 3)) + y.new_zeros(n, 8)
        elif self.way == "whole":
            y = (y + torch.ones(x.shape).mean()).mean((2, 3))
        else:
            y = y.mean((2, 3)).view(n, -1)
        return self.head(y)


class Output(Net):
    """Gives something else than (batch, classes), always or in training mode only."""

    def __init__(self, change: Callable[[Tensor], Any], *, in_training: bool = False) -> None:
        super().__init__()
        self.change, self.in_training = change, in_training

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return self.change(logits) if self.training or not self.in_training else logits


class Pair(NamedTuple):
    logits: Tensor
    aux: Tensor


class Shifting(Net):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Any:
        x -= 0.5
        return super().forward(x)


class InPlace(Net):
    """Overwrites its activations in most of the ways there are."""

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y = self.last(x)
        y += x
        return y.relu_().mul_(2)


class Branching(Net):
    """Noise in training mode only, by the network's code, and dropout in all its forms."""

    def body(self, x: Tensor) -> Tensor:
        x = F.dropout(self.stem(x), 0.5, self.training)
        if self.training:
            x = x + torch.randn_like(x)
        return self.last(self.middle(x))


class TwoOutputs(nn.Module):
    """A part with a tuple between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(), conv()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = TwoOutputs()

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.parts(x)
        return one + two


class Choices(nn.Module):
    """Layers in a ModuleDict and a ModuleList, scales in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": conv(), "b": nn.ReLU()})
        self.more = nn.ModuleList([conv()])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8, 1, 1))])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.ones(8, 1, 1))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers["b"](self.layers["a"](x))
        for layer in self.more:
            x = layer(x)
        return x * self.scales[0] + self.shifts["a"]


class Cubes(nn.Module):
    """A three-dimensional and a one-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Conv3d(1, 1, 3, padding=1)
        self.line = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cube(x.unsqueeze(1)).squeeze(1)
        return self.line(x.flatten(2)).view(x.shape)


class Detached(nn.Module):
    """A convolution that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.free = conv(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(x) + self.frozen(x).detach()


class Wasted(nn.Module):
    """A convolution whose output nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.wasted = conv()

    def forward(self, x: Tensor) -> Tensor:
        self.wasted(x)
        return x


class Untraceable(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x if x.sum() > 1e9 else x + 0)


class Detector(Net):
    """Wants more than images in training mode."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        if self.training and targets is None:
            raise ValueError("targets should be given")
        return super().forward(x)


class Skipping(Net):
    """Hands its input to the head, past all layers."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).mean((2, 3)) + x.mean((1, 2, 3)).unsqueeze(1))
