"""Formulas for the FLOPs of operations: PyTorch's, two a multiply-add, with one mended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from distill.blocks.chain import copied


def convolution_backward_flops(
    grad_output: list[int], inputs: list[int], weight: list[int], *options: Any, out_shape: object = None
) -> int:
    """Return the FLOPs of a convolution's gradients, given shapes: by input and by weight, each those of the forward.

    PyTorch 2.11 to 2.15 counts the gradient by weight of a convolution in groups as many times as it has groups.
    """
    transposed, output_mask = options[4], options[7]
    forward = conv_flop_count(inputs, weight, grad_output, transposed=transposed)
    return int(forward * sum(output_mask[:2]))


MENDED: Mapping[Any, Callable[..., int]] = {torch.ops.aten.convolution_backward: convolution_backward_flops}


class _Counter(FlopCounterMode):
    """Sees the operations of nn.MultiheadAttention and nn.TransformerEncoderLayer, which in eval mode are otherwise one
    that no formula is for."""

    def __enter__(self) -> Self:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> Any:
        torch.backends.mha.set_fastpath_enabled(self._fast)
        return super().__exit__(*error)  # type: ignore[no-untyped-call]


def flop_counter() -> FlopCounterMode:
    """Return a context in which FLOPs are counted."""
    return _Counter(display=False, custom_mapping=dict(MENDED))


FORMULAS: Mapping[Any, Callable[..., int]] = flop_counter().flop_registry  # by operation, called with its arguments


def module_flops(module: nn.Module, x: Tensor) -> int:
    """Return the FLOPs of a module's forward for an input like `x`, of which only the form counts; it is left alone."""
    imagined = copied(module).to("meta")
    dtype = next((parameter.dtype for parameter in imagined.parameters()), x.dtype)
    with torch.no_grad(), flop_counter() as counter:
        imagined(torch.empty_like(x, device="meta", dtype=dtype))
    return int(counter.get_total_flops())
