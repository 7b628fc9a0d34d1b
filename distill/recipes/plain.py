"""What a convolution computes, whatever its class: the torch.nn.Conv2d, and the padding before it, that do the same.

Classes derived from nn.Conv2d pad in their forward(), standardise their kernel, or are parametrized: a recipe that read
their settings would start from another convolution. Knows nothing of recipes.
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

_METHODS = ("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class OddConvolutionError(Exception):
    """A convolution that no torch.nn.Conv2d behind some zeros stands for; the message, after its path, says why."""


@dataclass(frozen=True)
class PlainForm:
    """`conv` behind `pad` gives what the convolution gives in eval mode; `conv` is that itself where it is plain."""

    conv: nn.Conv2d
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


def plain_form(conv: nn.Conv2d) -> PlainForm:
    """Return what stands for `conv`. Leaves it, its statistics and all random numbers alone.

    Raises OddConvolutionError.
    """
    if _is_plain(conv):
        return PlainForm(conv, None)
    calls = [_observe(conv, x) for x in _inputs(conv)]
    first = calls[0]
    if any(not _equal(call.given["weight"], first.given["weight"]) for call in calls):
        raise OddConvolutionError(f"{_name(conv)} whose kernel depends on its input")
    plain = _conv_of(first)
    for pad in _paddings(plain, first):
        if all(_equal(pad(call.x), call.given["input"]) for call in calls):
            return PlainForm(plain, None if isinstance(pad, nn.Identity) else pad)
    raise OddConvolutionError(f"{_name(conv)} that changes its input before it convolves")


def _is_plain(conv: nn.Conv2d) -> bool:
    own = any(getattr(type(conv), name) is not getattr(nn.Conv2d, name) or name in vars(conv) for name in _METHODS)
    registered = {"weight", "bias"} <= conv._parameters.keys()  # weight_norm() puts a plain tensor in the place
    return registered and not own and not any(getattr(conv, hooks) for hooks in _HOOKS)


def _name(conv: nn.Conv2d) -> str:
    kind = type(conv).__bases__[0] if parametrize.is_parametrized(conv) else type(conv)
    return f"a {kind.__name__}"


def _inputs(conv: nn.Conv2d) -> Iterator[Tensor]:
    """Yield inputs of every remainder that a stride may leave, as far as strides go in practice."""
    kernel = max((size - 1) * dilation + 1 for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True))
    tensor = next(conv.parameters())
    generator = torch.Generator().manual_seed(0)
    for more in range(4):
        size = 2 * kernel + more
        yield torch.randn(1, conv.in_channels, size, size + 1, generator=generator).to(tensor.device, tensor.dtype)


@dataclass(frozen=True)
class _Call:
    """One call of a convolution on `x`, and what it gave to torch's function in it."""

    x: Tensor
    given: dict[str, Any]


class _Listener(TorchFunctionMode):
    """Hears every convolution of a pass and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.conv2d:
            given = _DEFAULTS | dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            self.heard.append((given, result))
        return result


@torch.no_grad()
def _observe(conv: nn.Conv2d, x: Tensor) -> _Call:
    listener = _Listener()
    try:
        alone = copied(conv).eval()
        with listener:
            result = alone(x)
    except Exception as error:  # a network's own code can raise anything
        reason = str(error).strip().partition("\n")[0]
        raise OddConvolutionError(
            f"{_name(conv)} that cannot be run alone: {type(error).__name__}: {reason}"
        ) from error
    if len(listener.heard) != 1 or listener.heard[0][1] is not result:
        raise OddConvolutionError(f"{_name(conv)} that does more than to convolve")
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


def _paddings(conv: nn.Conv2d, call: _Call) -> Iterator[nn.Module]:
    """Yield what may pad the input before `conv`: nothing, TensorFlow's rule, fixed numbers of zeros."""
    yield nn.Identity()
    yield SamePad2d(conv)
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
