"""What kernels a network's step consists of, by running it on tensors without memory: FLOPs and bytes of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.profiling.flops import FORMULAS
from distill.simulation.hardware import Operation

_NO_KERNEL = frozenset({"empty", "empty_like", "empty_strided", "detach", "_unsafe_view"})


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation that runs inside it, one kernel each, as an eager GPU would launch them.

    A kernel is taken to read every input once from memory and to write every output once to it. Views cost nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def count(self) -> int:
        """Return the number of operations so far."""
        return len(self.operations)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        result = func(*args, **keywords)
        name = func.overloadpacket.__name__
        inputs, outputs = _tensors((args, keywords)), _tensors(result)
        if func.namespace == "aten" and not func.is_view and name not in _NO_KERNEL and (inputs or outputs):
            count = FORMULAS.get(func.overloadpacket)
            flops = count(*args, **keywords, out_val=result) if count else 0
            written = outputs if outputs else _mutated(func, args, keywords)
            self.operations.append(Operation(flops, _nbytes(inputs) + _nbytes(written), _unit(name, args)))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _mutated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operation without a result (a fused optimizer's) writes to."""
    entries = func._schema.arguments
    given = {entry.name: value for entry, value in zip(entries, args, strict=False)} | dict(kwargs)
    return _tensors([given.get(entry.name) for entry in entries if entry.alias_info and entry.alias_info.is_write])


def _unit(name: str, args: Sequence[Any]) -> str:
    """The unit that computes an operation: depthwise convolutions do not run on tensor cores, and PyTorch lets fp32
    convolutions use tf32 but not fp32 matrix products."""
    convolution = name in ("convolution", "convolution_backward")
    tensors = _tensors(args)
    if convolution and args[8 if name == "convolution" else 9] > 1:
        return "fp32"
    if tensors and tensors[0].dtype is torch.bfloat16:
        return "bf16"
    return "tf32" if convolution else "fp32"
