"""What runs networks where they are used: one class a runtime, which turns a network into a program that can be timed,
with the threads and in the precision that are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.deployment import measure
from distill.deployment.graphs import onnx_key as key_of
from distill.deployment.graphs import to_delivered_onnx, to_onnx, torch_key
from distill.deployment.measure import Call
from distill.deployment.quantised import quantised
from distill.errors import ConfigError, install, one_of
from distill.student.programs import contiguous_copy

CUDA_WARM_UPS = 3  # calls before a graph is captured: libraries choose their kernels in them


@dataclass(frozen=True)
class Source:
    """A network in the form that a runtime takes. `key` is the same for all that compute the same with other weights,
    and what a timing is kept under."""

    key: str
    program: Any


@dataclass(frozen=True, kw_only=True)
class Runtime(ABC):
    """A runtime as it is asked for. Raises ConfigError where it cannot do that here."""

    name: ClassVar[str]
    extra: ClassVar[str | None] = None  # of this package, which brings it
    packages: ClassVar[tuple[str, ...]] = ("torch",)  # that it needs, of which the first is its own
    precisions: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    threads: int = 1
    precision: str = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.precision not in self.precisions:
            raise ConfigError("deploy.precision", self.precision, f"{one_of(self.precisions)} with {self.name}")
        if self.device not in self.devices:
            raise ConfigError("deploy.device", self.device, f"{one_of(self.devices)} with {self.name}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("deploy.device", "cuda", "cpu: PyTorch finds no CUDA device here")

    @classmethod
    def missing(cls) -> str | None:
        """Return the package that has to be installed for it; None where all are."""
        return next((name for name in cls.packages if find_spec(name) is None), None)

    @abstractmethod
    def source(self, module: nn.Module, sample: Tensor) -> Source:
        """Return a network that takes a batch like `sample` (B, C, H, W), as this runtime takes it."""

    def whole(self, network: nn.Module, sample: Tensor) -> Source:
        """Return the source of a whole network, as it is delivered."""
        return self.source(network, sample)

    @abstractmethod
    def start(self, source: Source, sample: Tensor) -> Call:
        """Return what runs it on a batch of that shape."""

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What a timing holds for, besides the program and the batch, as JSON values."""
        found = measure.environment(self.packages[0], threads=self.threads, precision=self.precision)
        found["runtime"] = self.name
        return found if self.device == "cpu" else found | {"clock": "gpu", "gpu": torch.cuda.get_device_name()}


class ReadsOnnx(Runtime):
    """A runtime of ONNX programs, on the CPU: it folds batch norms itself."""

    def source(self, module: nn.Module, sample: Tensor) -> Source:
        plain = contiguous_copy(module).eval().requires_grad_(False)
        content = to_onnx(plain, sample[:2].contiguous())
        return self.source_of(content)

    def whole(self, network: nn.Module, sample: Tensor) -> Source:
        plain = contiguous_copy(network).eval().requires_grad_(False)
        return self.source_of(to_delivered_onnx(plain, sample[:1].repeat(2, 1, 1, 1)))

    def source_of(self, content: bytes, int8: bytes | None = None) -> Source:
        """Return the source of an ONNX program in fp32, of which `int8` is the form in INT8 where that is there: else
        it is quantised where the precision asks for it."""
        # the key is of what is to be computed: quantised, it would depend on the weights
        return Source(key_of(content), content if self.precision != "int8" else int8 or quantised(content))

    def start(self, source: Source, sample: Tensor) -> Call:
        try:
            return measure.opened(
                source.program,
                batch=len(sample),
                runtime=self.name,
                threads=self.threads,
                precision=self.precision,
            )
        except measure.MeasureError as error:
            raise ConfigError("deploy.precision", self.precision, f"what {self.name} can do here: {error}") from error


class OnnxRuntime(ReadsOnnx):
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")
    extra = "onnx"
    precisions = ("fp32", "int8")


class OpenVino(ReadsOnnx):
    """OpenVINO's CPU plugin, tuned for the time of one call."""

    name = "openvino"
    packages = ("openvino", "onnx", "onnxruntime")  # whose quantiser makes INT8 programs for it
    extra = "openvino"
    precisions = ("fp32", "bf16", "int8")


class Torch(Runtime):
    """PyTorch itself, operation by operation; batch norms stay as they are.

    On a GPU (which no machine of ours has tried yet) a captured graph is replayed between two events, so that neither
    the time to launch kernels nor that to wait for them is counted.
    """

    name = "torch"
    precisions = ("fp32", "bf16")
    devices = ("cpu", "cuda")

    def source(self, module: nn.Module, sample: Tensor) -> Source:
        plain = contiguous_copy(module).eval().requires_grad_(False)
        return Source(torch_key(plain, sample.contiguous()), plain)

    def start(self, source: Source, sample: Tensor) -> Call:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        layout = torch.channels_last if sample.dim() == 4 else torch.contiguous_format
        module = source.program.to(self.device, dtype).to(memory_format=layout)
        images = torch.zeros(sample.shape, dtype=dtype, device=self.device).contiguous(memory_format=layout)
        run = self._program(module)
        return _graph_replayed(run, images) if self.device == "cuda" else self._timed(run, images)

    def _program(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return module

    def _timed(self, run: Callable[[Tensor], Tensor], images: Tensor) -> Call:
        timed = measure.timed(lambda: run(images), self.threads)

        def call(times: int) -> float:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                with torch.inference_mode():
                    return timed(times)
            finally:
                torch.set_num_threads(before)

        return call


class TorchCompile(Torch):
    """PyTorch's compiler, weights frozen: batch norms are folded."""

    name = "torch_compile"

    def _program(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        compiled = torch.compile(module, dynamic=False, options={"freezing": True})

        def run(images: Tensor) -> Tensor:
            try:
                return compiled(images)  # type: ignore[no-any-return]
            except import_module("torch._dynamo.exc").TorchDynamoException as error:
                first = str(error).strip().partition("\n")[0]
                allowed = f"torch: the compiler fails here, for want of a C++ compiler perhaps ({first})"
                raise ConfigError("deploy.runtime", self.name, allowed) from error

        return run


def _graph_replayed(run: Callable[[Tensor], Tensor], images: Tensor) -> Call:
    """Return the replay of a CUDA graph, timed by the GPU's own events."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        for _ in range(CUDA_WARM_UPS):
            run(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        run(images)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def call(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    return call


RUNTIMES: dict[str, type[Runtime]] = {one.name: one for one in (OnnxRuntime, OpenVino, Torch, TorchCompile)}


def runtime_of(name: str | None, *, threads: int, precision: str, device: str) -> Runtime:
    """Return the runtime of that name; None: onnxruntime where it is installed and does this, else torch."""
    if name is None:
        usual = OnnxRuntime.missing() is None and precision in OnnxRuntime.precisions and device in OnnxRuntime.devices
        name = OnnxRuntime.name if usual else Torch.name
    kind = RUNTIMES[name]
    absent = kind.missing()
    if absent is not None:
        allowed = f"a runtime that is installed; {absent} is not: {install(str(kind.extra))}"
        raise ConfigError("deploy.runtime", name, allowed)
    return kind(threads=threads, precision=precision, device=device)
