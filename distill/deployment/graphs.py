"""Networks as graphs: exported for a runtime, and told apart by what is computed, whatever names and weights are.

Programs of blocks are only timed, so they are exported by torch's older exporter, which takes a twentieth of the newer
one's second; where it is gone or cannot do a block, the newer one does. What is delivered comes from
distill/student/programs.py.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.student.onnx_programs import onnx_program
from distill.student.programs import quietly

MANY = 64  # whole numbers up to which they are taken for a shape
INPUT, OUTPUT = "images", "logits"  # as in what is delivered


class NotExportableError(DistillError):
    """A network that no exporter turns into a program."""


def to_onnx(module: nn.Module, sample: Tensor) -> bytes:
    """Return a network in eval mode as an ONNX program that takes any batch like `sample`.

    Raises NotExportableError.
    """
    return _exported(module, sample, (_traced, onnx_program))


def to_delivered_onnx(network: nn.Module, sample: Tensor) -> bytes:
    """to_onnx() of a whole network, by the exporter of what is delivered."""
    return _exported(network, sample, (onnx_program,))


def _exported(module: nn.Module, sample: Tensor, exporters: Sequence[Callable[[nn.Module, Tensor], bytes]]) -> bytes:
    errors = []
    for export in exporters:
        try:
            with quietly():
                return export(module, sample)
        except Exception as error:  # whatever an exporter raises
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise NotExportableError(f"no ONNX program can be made of it ({'; '.join(errors)})")


def _traced(module: nn.Module, sample: Tensor) -> bytes:
    stream, batch = io.BytesIO(), {0: "batch"}
    torch.onnx.export(
        module,
        (sample,),
        stream,  # type: ignore[arg-type]  # taken by this exporter
        dynamo=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={INPUT: batch, OUTPUT: batch},
    )
    return stream.getvalue()


def onnx_key(content: bytes) -> str:
    """Return 32 hexadecimal digits: the same for ONNX programs that differ in names and weights' values alone."""
    return _digest(_onnx_lines(import_module("onnx").load_from_string(content).graph))


def _onnx_lines(graph: Any) -> Iterator[str]:
    helper = import_module("onnx.helper")
    numbers: dict[str, int] = {"": -1}  # an optional input that is left out

    def numbered(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    constants = {one.name: _onnx_tensor(one) for one in graph.initializer}
    for value in graph.input:
        if value.name not in constants:
            form = value.type.tensor_type
            sides = [side.dim_value or "any" for side in form.shape.dim]
            yield f"input {numbered(value.name)} {form.elem_type} {sides}"
    for node in graph.node:
        inputs = [constants.get(name) or numbered(name) for name in node.input]
        attributes = []
        for one in sorted(node.attribute, key=lambda one: one.name):
            value = helper.get_attribute_value(one)
            # a graph within, as of an If, by its own lines
            shown = [*_onnx_lines(value)] if hasattr(value, "node") else value
            attributes.append((one.name, _onnx_tensor(value) if hasattr(value, "dims") else shown))
        yield f"{node.domain}:{node.op_type} {inputs} {attributes} {[numbered(name) for name in node.output]}"
    yield f"outputs {[numbered(value.name) for value in graph.output]}"


def _onnx_tensor(tensor: Any) -> str:
    """A constant by its value where that decides what is computed: whole numbers (shapes, axes) and single ones
    (exponents). All others are weights."""
    kinds = import_module("onnx").TensorProto
    form, count = f"{tensor.data_type}{list(tensor.dims)}", math.prod(tensor.dims)
    decides = count <= 1 or (count <= MANY and tensor.data_type in (kinds.INT64, kinds.INT32, kinds.BOOL))
    return f"{form}={import_module('onnx.numpy_helper').to_array(tensor).tolist()}" if decides else form


def torch_key(module: nn.Module, sample: Tensor) -> str:
    """onnx_key() of a network that torch runs itself, in eval mode, on a batch like `sample`."""
    try:
        with quietly(), torch.no_grad():
            program = torch.export.export(module, (sample,))
    except Exception as error:  # whatever the exporter raises
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotExportableError(f"torch.export cannot read it ({first})") from error
    return _digest(_torch_lines(program.graph))


def _torch_lines(graph: torch.fx.Graph) -> Iterator[str]:
    numbers: dict[torch.fx.Node, str] = {}
    for node in graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        arguments = torch.fx.map_arg((node.args, node.kwargs), lambda one: _Named(numbers[one]))
        value = node.meta.get("val")
        form = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else ""
        yield f"{node.op} {'' if node.op == 'placeholder' else node.target} {arguments} {form}"


class _Named(str):
    """A node's number as an argument shows it."""

    __repr__ = str.__str__


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
