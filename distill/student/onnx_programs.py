"""Networks as ONNX programs, by the exporter of what is delivered. It takes seconds, so that a network that is timed,
compared and delivered is exported once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import DistillError

ONNX_BYTES = 2**31 - 2**24  # of weights: protobuf ends at 2 GiB, and the graph needs room too
PLAIN = (bool, int, float, str, tuple)  # attributes of a layer that are options
KEPT_BYTES = 2**28  # of programs, the last ones


class Named(nn.Module):
    """A network with the input's name that its programs show."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.student(images)
        return logits


def onnx_program(module: nn.Module, sample: Tensor) -> bytes:
    """Return a network in eval mode as an ONNX program from images, any number of them, to logits.

    `sample` are two images or more: a batch of one would be taken for a constant. Needs the extra onnx.
    """
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    if weights > ONNX_BYTES:
        raise DistillError(f"{weights / 2**30:.1f} GiB of weights: an ONNX file without external data ends at 2 GiB")
    module = module if isinstance(module, Named) else Named(module).eval()
    key = _digest(module, sample)
    found = _made.get(key)
    if found is None:
        found = _made[key] = _exported(module, sample)
        while len(_made) > 1 and sum(map(len, _made.values())) > KEPT_BYTES:
            _made.popitem(last=False)
    return found


_made: OrderedDict[str, bytes] = OrderedDict()


def _digest(module: nn.Module, sample: Tensor) -> str:
    """Return the same for networks of the same layers, options and weights. What it misses, such as values inside a
    list that code reads, comparison finds: no program is delivered that was not compared with its own network."""
    digest = hashlib.sha256(f"{module!r} {tuple(sample.shape)} {sample.dtype}".encode())
    for path, part in module.named_modules():
        options = sorted((name, value) for name, value in vars(part).items() if isinstance(value, PLAIN))
        digest.update(f"{path} {type(part).__module__}.{type(part).__qualname__} {options}\n".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _exported(module: nn.Module, sample: Tensor) -> bytes:
    program = torch.onnx.export(
        module,
        (sample,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None
    proto: Any = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # paths of the machine that exported it
    content: bytes = proto.SerializeToString()
    return content
