"""The student as programs that run without this package: student.pt2 (torch.export) and student.onnx; beside them
teacher.onnx, to compare with.

A program is written only after it has been loaded afresh and has given the eager student's answers. Knows nothing of
the job; a failure here is a record for metrics.json, never an exception: the weights are delivered already.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.blocks.chain import copied
from distill.errors import DistillError, install
from distill.storage.files import write_bytes
from distill.student.files import StudentCard
from distill.student.onnx_programs import Named, onnx_program

CARD = "student.json"  # the name under which the card travels inside both files
TOLERANCE = 1e-3  # largest difference of a logit in fp32 that rounding may explain,
RELATIVE = 1e-4  # or this share of the largest logit, where those are large
BATCHES = (1, 7)  # tried besides the images as they come, because an exporter may fix the size it has seen
NOT_WANTED = "not asked for"  # status of a program
NOISY = ("torch", "onnxscript", "onnx_ir")  # loggers of the exporters

Program = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How a program's logits compare with the eager student's over some images."""

    max_abs_difference: float
    top1_agreement: float  # percent of the images with the same first guess
    images: int


@dataclass(frozen=True)
class Form:
    """One kind of program: its file, the packages it needs, how it is made from a module and loaded from bytes."""

    file: str
    packages: tuple[str, ...]
    make: Callable[[nn.Module, Tensor, str], bytes]
    load: Callable[[bytes], Program]


class NotInstalledError(Exception):
    """A package that a form needs is absent."""


def deliver_programs(
    folder: Path,
    student: nn.Module,
    card: StudentCard,
    batches: Sequence[Tensor],
    *,
    wanted: Collection[str] = ("pt2", "onnx"),
    onnx_form: nn.Module | None = None,
) -> dict[str, dict[str, Any]]:
    """Write student.pt2 and student.onnx into `folder`; return what became of each, for metrics.json.

    `batches` are normalised images (B, 3, H, W), float32, on any device: both programs are compared on all of them
    with a CPU copy of the student. An entry has file, status (ok, failed, not installed), and what was measured as
    max_abs_difference, top1_agreement (percent) and images; reason where the status is not ok. A file of that name
    from an earlier delivery is removed first, so that what lies there is what the record speaks of, also where it is
    not `wanted` any more. `onnx_form` is a network of the same function from which student.onnx is made.
    """
    module, images, text = _on_cpu(student), _plain(batches), json.dumps(asdict(card))
    made_from = {"onnx": module if onnx_form is None else _on_cpu(onnx_form)}
    return {
        name: _deliver(folder, form, module, text, images, made_from=made_from.get(name, module))
        if name in wanted
        else not_wanted(folder, form.file)
        for name, form in FORMS.items()
    }


def not_wanted(folder: Path, file: str) -> dict[str, Any]:
    """Return the record of a program that is not asked for; one of an earlier delivery goes."""
    (folder / file).unlink(missing_ok=True)
    return {"file": file, "status": NOT_WANTED, "reason": "not in deploy.programs"}


def deliver_teacher(folder: Path, teacher: nn.Module, card: StudentCard, batches: Sequence[Tensor]) -> dict[str, Any]:
    """deliver_programs() of the teacher as teacher.onnx, which `card` describes; return what became of it."""
    form, module = replace(FORMS["onnx"], file="teacher.onnx"), _on_cpu(teacher)
    return _deliver(folder, form, module, json.dumps(asdict(card)), _plain(batches), made_from=module)


def _on_cpu(network: nn.Module) -> nn.Module:
    return Named(contiguous_copy(network)).eval().requires_grad_(False)


def contiguous_copy(network: nn.Module) -> nn.Module:
    """Return a copy of a network as it is exported: on the CPU, its weights in the usual order of dimensions."""
    return copied(network).cpu().to(memory_format=torch.contiguous_format)


def _plain(batches: Sequence[Tensor]) -> list[Tensor]:
    return [batch.detach().cpu().contiguous() for batch in batches]


def _deliver(
    folder: Path, form: Form, module: nn.Module, card: str, images: Sequence[Tensor], *, made_from: nn.Module
) -> dict[str, Any]:
    """Write a program that is made from a network of the same function as `module`."""
    path = folder / form.file
    record: dict[str, Any] = {"file": form.file, "max_abs_difference": None, "top1_agreement": None, "images": 0}
    try:
        path.unlink(missing_ok=True)
        with quietly():
            _require(form.packages)
            content = form.make(made_from, images[0], card)
            agreement = compare(form.load(content), module, images)
        record |= asdict(agreement)
        allowed = max(TOLERANCE, RELATIVE * max(float(module(batch).abs().max()) for batch in images))
        if not agreement.max_abs_difference <= allowed:  # also refuses nan
            raise DistillError(
                f"its logits differ from the eager {path.stem}'s by up to {agreement.max_abs_difference:.3g}; "
                f"at most {allowed:.3g} is allowed"
            )
        write_bytes(path, content)
    except NotInstalledError as absent:
        return record | {"status": "not installed", "reason": str(absent)}
    except Exception as error:  # whatever an exporter raises must not cost the run
        return record | {"status": "failed", "reason": in_one_line(error)}
    return record | {"status": "ok"}


@torch.no_grad()
def compare(program: Program, eager: Program, batches: Sequence[Tensor]) -> Agreement:
    """Return how far `program` is from `eager` over `batches` of images, which it is also shown one and seven at once.

    The differences are those of logits, absolute, without a unit; nan where either gives nan.
    """
    largest, same, count = 0.0, 0, 0
    for size in BATCHES:
        few = batches[0][torch.arange(size) % len(batches[0])]
        largest = _larger(largest, _difference(program(few), eager(few)))
    for batch in batches:
        given, expected = program(batch), eager(batch)
        largest = _larger(largest, _difference(given, expected))
        same += int((given.argmax(dim=1) == expected.argmax(dim=1)).sum())
        count += len(batch)
    return Agreement(largest, 100 * same / count, count)


def _difference(given: Tensor, expected: Tensor) -> float:
    # Checked first: the subtraction would broadcast shapes that differ.
    if given.shape != expected.shape:
        raise DistillError(f"it returns logits of shape {tuple(given.shape)}, not {tuple(expected.shape)}")
    return float((given - expected).abs().max())


def _larger(a: float, b: float) -> float:
    # max() keeps its first argument where the second is NaN: a failure would be lost among the batches.
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _make_pt2(module: nn.Module, images: Tensor, card: str) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (_sample(images),), dynamic_shapes={"images": {0: batch}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that exported it
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={CARD: card})
    return stream.getvalue()


def _load_pt2(content: bytes) -> Program:
    return torch.export.load(io.BytesIO(content)).module()


def _make_onnx(module: nn.Module, images: Tensor, card: str) -> bytes:
    proto = importlib.import_module("onnx").load_from_string(onnx_program(module, _sample(images)))
    entry = proto.metadata_props.add()
    entry.key, entry.value = CARD, card
    content: bytes = proto.SerializeToString()
    return content


def load_onnx(content: bytes) -> Program:
    """Return an ONNX program in ONNX Runtime, with as many threads as PyTorch has here."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # fatal: its errors come as exceptions as well
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


FORMS = {
    "pt2": Form("student.pt2", (), _make_pt2, _load_pt2),
    "onnx": Form("student.onnx", ("onnx", "onnxscript", "onnxruntime"), _make_onnx, load_onnx),
}


def _sample(images: Tensor) -> Tensor:
    """Two images: a batch of one would be taken for a constant."""
    return images[torch.arange(2) % len(images)]


def _require(packages: Sequence[str]) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise NotInstalledError(f"{package} is missing: {install('onnx')}") from error


def in_one_line(error: Exception) -> str:
    """Return what went wrong in an exporter or a runtime, for a record."""
    if isinstance(error, DistillError):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "no reason given")
    return f"{type(error).__name__}: {first}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the exporters' progress, warnings and log lines away from the user: what matters is in the record."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
