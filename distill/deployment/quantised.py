"""ONNX programs in INT8: quantised statically, with the scales of activations written beside them (QDQ)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from distill.student.programs import quietly

RANDOM_IMAGES = 4


def quantised(content: bytes, images: Sequence[np.ndarray[Any, Any]] = ()) -> bytes:
    """Return an ONNX program of one input in INT8: weights per output channel, activations by their range over
    batches of `images`. Without images, over random ones, which do for how fast it is and for nothing else.

    Operations between two quantised ones are left to the runtime, which fuses them.
    """
    onnx, tools = import_module("onnx"), import_module("onnxruntime.quantization")
    prepare = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    (given,) = onnx.load_from_string(content).graph.input
    batches = images or [_random(given.type.tensor_type.shape.dim)]
    feeds = iter([{given.name: batch} for batch in batches])

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    root, level = logging.getLogger(), logging.getLogger().level
    with tempfile.TemporaryDirectory(prefix="distill-int8-") as folder, quietly():
        given_file, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "int8"))
        given_file.write_bytes(content)
        try:
            root.setLevel(logging.ERROR)  # the quantiser advises on the root logger
            # batch norms are folded first: behind a quantised convolution they would stay in fp32
            prepare(given_file, prepared, skip_symbolic_shape=True)
            tools.quantize_static(prepared, made, Reader(), per_channel=True, activation_type=tools.QuantType.QUInt8)
        finally:
            root.setLevel(level)
        return made.read_bytes()


def _random(sides: Sequence[Any]) -> np.ndarray[Any, Any]:
    shape = [side.dim_value for side in sides][1:]
    return np.random.default_rng(0).standard_normal((RANDOM_IMAGES, *shape), dtype=np.float32)
