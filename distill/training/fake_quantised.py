"""A block computed as it will be in INT8, in numbers that can be trained: weights and activations are rounded to what a
statically quantised program (QDQ, as ONNX Runtime's quantizer writes it) has of them, and gradients pass the rounding.

Knows nothing of programs, runtimes or jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

_OPS = torch.ops.aten
WEIGHTED = {_OPS.conv2d.default, _OPS.conv2d.padding, _OPS.linear.default}
NORM = _OPS.batch_norm.default
# What is quantised besides: its inputs and its output. All else takes the levels that its inputs are in.
QUANTISED = WEIGHTED | {
    _OPS.add.Tensor, _OPS.add_.Tensor, _OPS.mul.Tensor, _OPS.mul_.Tensor, _OPS.cat.default, _OPS.sigmoid.default,
    _OPS.sigmoid_.default, _OPS.max_pool2d.default, _OPS.avg_pool2d.default, _OPS.adaptive_avg_pool2d.default,
}  # fmt: skip
# Done by the range of what is before: below it there are no levels.
CLIPS = {
    _OPS.relu.default, _OPS.relu_.default, _OPS.hardtanh.default, _OPS.hardtanh_.default, _OPS.clamp.default,
}  # fmt: skip


class FakeQuantised(nn.Module):
    """A block in eval mode, its batch norms folded into the convolutions before them: weights symmetric in -127 to 127,
    one scale for an output channel; activations in 0 to 255, one scale for a tensor, from its least to its largest
    value that the block gives in fp32 for the batch at hand, as calibration on that batch would set it.

    Has the block's parameters, under their names. Straight-through gradients (Bengio, Leonard, Courville 2013,
    arXiv:1308.3432); the batch norms' statistics stay.
    """

    def __init__(self, block: nn.Module, sample: Tensor) -> None:
        """`sample` is a batch of two or more like those that the block takes."""
        super().__init__()
        batch = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(block.eval(), (sample,), dynamic_shapes=batch).module(check_guards=False)
        self.program = fx.GraphModule(program, program.graph)  # one that can be switched to training: nothing changes
        self._rounded = {node.name for node in self.program.graph.nodes if _is_rounded(node)}

    def forward(self, x: Tensor) -> Tensor:
        calibration = _Calibration(self.program, self._rounded)
        with torch.no_grad():
            calibration.run(x)
        result: Tensor = _Levels(self.program, calibration.ranges).run(x)
        return result


class _Calibration(fx.Interpreter):
    """Runs a block's operations in fp32, and keeps the ranges of what is rounded in INT8."""

    def __init__(self, program: fx.GraphModule, rounded: set[str]) -> None:
        super().__init__(program)
        self._rounded, self.ranges = rounded, dict[str, tuple[Tensor, Tensor]]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._rounded:
            self.ranges[n.name] = value.min(), value.max()
        return value


class _Levels(fx.Interpreter):
    """Runs a block's operations, and rounds what is rounded in INT8."""

    def __init__(self, program: fx.GraphModule, ranges: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(program)
        self._ranges = ranges

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target in WEIGHTED:
            value = self._weighted(n)
        elif n.target is NORM and _folded(n):
            value = self.env[n.args[0]]  # type: ignore[index]
        else:
            value = super().run_node(n)
        return in_levels(value, *self._ranges[n.name]) if n.name in self._ranges else value

    def _weighted(self, n: fx.Node) -> Tensor:
        (x, weight, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        bias, *others = rest or [None]
        norm = next(iter(n.users))
        if norm.target is NORM and _folded(norm):
            weight, bias = self._with_norm(weight, bias, norm)
        assert callable(n.target)
        result: Tensor = n.target(x, rounded_weights(weight), bias, *others, **kwargs)
        return result

    def _with_norm(self, weight: Tensor, bias: Tensor | None, norm: fx.Node) -> tuple[Tensor, Tensor]:
        """Return a layer's weight and bias with the batch norm behind it."""
        _, *nodes, _, _, eps, _ = norm.args
        gamma, beta, mean, var = (self.env[one] if isinstance(one, fx.Node) else None for one in nodes)
        assert isinstance(mean, Tensor)  # in eval mode, as the two below
        assert isinstance(var, Tensor)
        assert isinstance(eps, float)
        scale = torch.rsqrt(var + eps)
        scale = scale if gamma is None else gamma * scale
        shift = -mean * scale if bias is None else (bias - mean) * scale
        return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift if beta is None else shift + beta


def in_levels(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return activations rounded to 256 levels from a least value to a largest one, of which zero is one."""
    with torch.no_grad():
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
        zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def rounded_weights(weight: Tensor) -> Tensor:
    """Return weights (outputs first) rounded to whole multiples, -127 to 127, of one scale for each output."""
    with torch.no_grad():
        scale = (weight.abs().flatten(1).amax(dim=1) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -127, 127)


def _folded(norm: fx.Node) -> bool:
    """Whether a batch norm becomes part of the layer before it."""
    before = norm.args[0]
    return isinstance(before, fx.Node) and before.target in WEIGHTED and len(before.users) == 1


def _is_rounded(node: fx.Node) -> bool:
    """Whether what an operation gives is quantised."""
    value = node.meta.get("val")
    if node.op in {"placeholder", "get_attr"} or not isinstance(value, Tensor):
        return node.op == "placeholder"
    users = [*node.users]
    if len(users) == 1 and (users[0].target in CLIPS or (users[0].target is NORM and _folded(users[0]))):
        return False
    own = node.args[0] if node.target in CLIPS or (node.target is NORM and _folded(node)) else node
    made = isinstance(own, fx.Node) and own.target in QUANTISED
    return value.is_floating_point() and (made or any(one.target in QUANTISED for one in node.users))
