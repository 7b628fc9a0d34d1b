"""What a layer computes, whatever its class: the torch.nn.Conv2d, and the padding before it, or the torch.nn.Linear,
that do the same.

Classes derived from these pad in their forward(), standardise their kernel, or are parametrized: a recipe that read
their settings would start from another layer. Knows nothing of recipes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from distill.blocks.chain import copied

Layer = nn.Conv2d | nn.Linear

_METHODS = ("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class OddLayerError(Exception):
    """A layer that no torch.nn.Conv2d behind some zeros, or torch.nn.Linear, stands for; the message, after its path,
    says why."""


@dataclass(frozen=True)
class PlainForm:
    """`layer` behind `pad` gives what the layer gives in eval mode; `layer` is that itself where it is plain."""

    layer: Layer
    pad: nn.Module | None


class SamePad2d(nn.Module):
    """TensorFlow's "same" padding: as many outputs as inputs, divided by the stride; the odd zero behind."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.sides = list(zip(_pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation), strict=True))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        amounts: list[int] = []
        for size, (kernel, stride, dilation) in zip(x_BCHW.shape[2:], self.sides, strict=True):
            total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            amounts = [total // 2, total - total // 2, *amounts]  # the last dimension comes first
        return F.pad(x_BCHW, amounts)


def plain_form(layer: Layer) -> PlainForm:
    """Return what stands for `layer`. Leaves it, its statistics and all random numbers alone.

    Raises OddLayerError.
    """
    if _is_plain(layer):
        return PlainForm(layer, None)
    calls = [_observe(layer, x) for x in _inputs(layer)]
    first = calls[0]
    if any(not _equal(call.given["weight"], first.given["weight"]) for call in calls):
        raise OddLayerError(f"{_name(layer)} whose kernel depends on its input")
    plain = _conv_of(first) if isinstance(layer, nn.Conv2d) else _linear_of(first)
    for pad in _paddings(plain, first):
        if all(_equal(pad(call.x), call.given["input"]) for call in calls):
            return PlainForm(plain, None if isinstance(pad, nn.Identity) else pad)
    raise OddLayerError(f"{_name(layer)} that changes its input first")


def _is_plain(layer: Layer) -> bool:
    kind = _kind(layer)
    own = any(
        getattr(type(layer), name) is not getattr(kind, name) or name in vars(layer)
        for name in _METHODS
        if hasattr(kind, name)
    )
    registered = {"weight", "bias"} <= layer._parameters.keys()  # weight_norm() puts a plain tensor in the place
    return registered and not own and not any(getattr(layer, hooks) for hooks in _HOOKS)


def _kind(layer: Layer) -> type[Layer]:
    return nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear


def _name(layer: Layer) -> str:
    kind = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
    return f"a {kind.__name__}"


def _inputs(layer: Layer) -> Iterator[Tensor]:
    """Yield inputs of every remainder that a stride may leave, as far as strides go in practice; rows of numbers to a
    linear layer."""
    tensor = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    for more in range(4):
        if isinstance(layer, nn.Conv2d):
            reach = max((k - 1) * step + 1 for k, step in zip(layer.kernel_size, layer.dilation, strict=True))
            size = 2 * reach + more
            shape: tuple[int, ...] = (1, layer.in_channels, size, size + 1)
        else:
            shape = (1, 1 + more, layer.in_features)
        yield torch.randn(shape, generator=generator).to(tensor.device, tensor.dtype)


@dataclass(frozen=True)
class _Call:
    """One call of a layer on `x`, and what it gave to torch's function in it."""

    x: Tensor
    given: dict[str, Any]


class _Listener(TorchFunctionMode):
    """Hears every call of a function in a pass, and its result."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.heard: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.function:
            given = _DEFAULTS | dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            self.heard.append((given, result))
        return result


@torch.no_grad()
def _observe(layer: Layer, x: Tensor) -> _Call:
    convolves = isinstance(layer, nn.Conv2d)
    listener = _Listener(F.conv2d if convolves else F.linear)
    try:
        alone = copied(layer).eval()
        with listener:
            result = alone(x)
    except Exception as error:  # a network's own code can raise anything
        reason = str(error).strip().partition("\n")[0]
        raise OddLayerError(f"{_name(layer)} that cannot be run alone: {type(error).__name__}: {reason}") from error
    if len(listener.heard) != 1 or listener.heard[0][1] is not result:
        raise OddLayerError(f"{_name(layer)} that does more than to {'convolve' if convolves else 'multiply'}")
    return _Call(x, listener.heard[0][0])


def _conv_of(call: _Call) -> nn.Conv2d:
    """Return the torch.nn.Conv2d that a call amounts to, behind its padding."""
    weight, bias = call.given["weight"], call.given["bias"]
    groups, padding = call.given["groups"], call.given["padding"]
    plain = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=_pair(call.given["stride"]),
        padding=padding if isinstance(padding, str) else _pair(padding),
        dilation=_pair(call.given["dilation"]),
        groups=groups,
        bias=bias is not None,
        device="meta",  # no random numbers are drawn
    )
    plain.weight = nn.Parameter(weight.detach().clone())
    plain.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return plain


def _linear_of(call: _Call) -> nn.Linear:
    """Return the torch.nn.Linear that a call amounts to."""
    weight, bias = call.given["weight"], call.given["bias"]
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    return plain


def _paddings(layer: Layer, call: _Call) -> Iterator[nn.Module]:
    """Yield what may pad the input before `layer`: nothing, TensorFlow's rule, fixed numbers of zeros."""
    yield nn.Identity()
    if not isinstance(layer, nn.Conv2d):
        return
    yield SamePad2d(layer)
    heights, widths = (
        inner - outer for inner, outer in zip(call.given["input"].shape[2:], call.x.shape[2:], strict=True)
    )
    for top in range(heights + 1):
        for left in range(widths + 1):
            yield nn.ZeroPad2d((left, widths - left, top, heights - top))


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and (one.device.type == "meta" or torch.equal(one, two))


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = (value,) if isinstance(value, int) else tuple(value)
    return int(first), int(rest[0] if rest else first)
