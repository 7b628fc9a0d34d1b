"""INT8 programs of teacher and student: what they cost in accuracy, and how fast they are beside one another.

A student that is faster than its teacher in fp32 can be slower than its teacher in INT8, so that the teacher gets a
program too. Both are quantised statically, after distillation, by the same training images. Where INT8 takes more than
noise from the student, blocks of it are trained for INT8 (int8_training.py), and the better program is delivered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from distill.config.schema import JobConfig
from distill.data import Batch, Dataset
from distill.deployment.graphs import to_delivered_onnx
from distill.deployment.measure import LIMIT_S, compared, summary
from distill.deployment.quantised import quantised
from distill.job.blocks import cut_chain
from distill.job.context import Context
from distill.job.int8_training import trained_for_int8, with_weights
from distill.job.latency import BATCHES, INT8_FILES, facts, int8_form, int8_runtime_of_job
from distill.job.reuse import TEACHER
from distill.observability.numbers import show, show_count
from distill.storage.checkpoint import contiguous
from distill.storage.files import write_bytes
from distill.student.evaluate import Hits, count_hits, images_at_a_time
from distill.student.programs import Program, contiguous_copy, in_one_line, load_onnx

log = logging.getLogger(__name__)

Images = Sequence[np.ndarray[Any, Any]]
# What is quantised by these images, from the fp32 program of that record -> the program, and what is told of it
Quantiser = Callable[[Context, Dataset, Mapping[str, Any], Images], tuple[bytes, dict[str, Any]]]

IMAGES, PART = 512, 64  # training images by whose activations ranges are set, and how many of them run at a time
FIT_FROM = 2000  # the first training batch of these: neither statistics nor fits have seen it
COUNTED = 10_000  # images of a split by which a program is judged, about: rank 0 is alone at that
NOTICED = 0.3  # points of validation accuracy that are more than noise
STAGE, WEIGHTS = "int8", "int8.safetensors"  # the record of training for INT8, and what it has made
AS_IT_IS, TRAINED = "as it is", "trained"  # the student that is quantised
EXPORTS = {"teacher": "teacher_onnx", "student": "onnx"}  # what INT8 programs are made of, by side


class _Running(nn.Module):
    """A program where a network is expected."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    def forward(self, images: Tensor) -> Tensor:
        return self._program(images.cpu().contiguous()).to(images.device)


def deliver_int8(
    context: Context, dataset: Dataset, student: nn.Module, exports: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Write teacher_int8.onnx, made of teacher.onnx, and student_int8.onnx, of the student in the form that is faster
    in INT8; return the section `int8` of metrics.json: what became of each, its accuracy, and the latency of both,
    measured in turn. `exports` are the records of the fp32 programs.

    A failure is a record, never an exception: what it is about is delivered already.
    """
    for name in INT8_FILES.values():
        (context.run.path / name).unlink(missing_ok=True)
    lacking = next((exports[export] for export in EXPORTS.values() if exports[export]["status"] != "ok"), None)
    if "int8" not in context.config.deploy.programs or lacking is not None:
        return {"reason": "not in deploy.programs" if lacking is None else f"{lacking['file']}: {lacking['reason']}"}
    images = _images(dataset)
    quantise: dict[str, Quantiser] = {"teacher": _teacher, "student": partial(_student, network=student)}
    programs: dict[str, bytes] = {}
    found: dict[str, Any] = {"images": sum(map(len, images))}
    for side, name in INT8_FILES.items():
        try:
            programs[side], record = quantise[side](context, dataset, exports[EXPORTS[side]], images)
            write_bytes(context.run.path / name, programs[side])
            found[side] = {"file": name, "status": "ok", "bytes": len(programs[side]), **record}
        except Exception as error:  # whatever quantiser and runtime raise
            programs.pop(side, None)
            found[side] = {"file": name, "status": "failed", "reason": in_one_line(error)}
    if len(programs) == len(INT8_FILES):
        try:
            found["latency"] = _latency(context.config, programs)
        except Exception as error:
            found["latency"] = {"batches": {}, "reason": in_one_line(error)}
    return found


def _images(dataset: Dataset) -> Images:
    parts: list[np.ndarray[Any, Any]] = []
    step = FIT_FROM
    while sum(map(len, parts)) < IMAGES:
        images = dataset.train_batch(step).images.cpu().contiguous()
        parts += [part.numpy() for part in torch.split(images, PART)]
        step += 1
    return parts


def _teacher(
    context: Context, dataset: Dataset, export: Mapping[str, Any], images: Images
) -> tuple[bytes, dict[str, Any]]:
    content = quantised((context.run.path / export["file"]).read_bytes(), images)
    return content, _validated(content, dataset) | _tested(content, dataset)


def _student(
    context: Context, dataset: Dataset, export: Mapping[str, Any], images: Images, *, network: nn.Module
) -> tuple[bytes, dict[str, Any]]:
    """Return the student's program in INT8, and what is told of it: that of the student as it is, or after training for
    INT8 where that is better on validation images. Test images are read once, by the one that is chosen."""
    whole = (context.run.path / export["file"]).read_bytes()
    form, told = int8_form(context.config, network, image_shape=dataset.image_shape)
    content = quantised(whole if told.get("form") == export.get("form") else _exported(form, dataset, whole), images)
    record = _validated(content, dataset)
    lost = (_top1(form, dataset) or 0.0) - (record["validation_top1"] or 0.0)
    if context.config.deploy.int8_steps > 0 and lost > NOTICED:
        try:
            weights, training = _trained(context, dataset, form)
            other = quantised(_exported(with_weights(form, weights), dataset, whole), images)
            better = _validated(other, dataset)
            both = {AS_IT_IS: record["validation_top1"], TRAINED: better["validation_top1"]}
            kept = max(both, key=lambda name: both[name])  # the first of equals
            content, record = (other, better) if kept == TRAINED else (content, record)
            told["training"] = {**training, "validation_top1": both, "kept": kept}
        except Exception as error:  # whatever cutting and torch.export raise of a network: it is quantised as it is
            told["training"] = {"reason": in_one_line(error)}
    return content, record | _tested(content, dataset) | told


def _trained(context: Context, dataset: Dataset, form: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of blocks that were trained for INT8, and what is told of that: of an earlier delivery, where
    it has trained the same."""
    steps, shapes = context.config.deploy.int8_steps, [[*tensor.shape] for tensor in form.state_dict().values()]
    found = context.run.result(STAGE)
    if found is None or (found["steps"], found["shapes"]) != (steps, shapes):
        start = time.process_time()
        network = contiguous_copy(form).eval()
        chain = cut_chain(context.config, dataset.image_shape, network, torch.device("cpu"))
        weights, errors = trained_for_int8(chain, dataset, steps=steps)
        write_bytes(context.run.path / WEIGHTS, save(contiguous(weights)))
        found = {"steps": steps, "shapes": shapes, "blocks": errors, "cpu_seconds": time.process_time() - start}
        delivered = context.run.result("evaluate")["delivered"]
        context.run.complete(STAGE, found, made=[WEIGHTS], used=[TEACHER, f"{delivered}.safetensors"])
    told = {name: found[name] for name in ("steps", "blocks", "cpu_seconds")}
    return load(context.run.read(WEIGHTS)), told


def _exported(network: nn.Module, dataset: Dataset, whole: bytes) -> bytes:
    """Return a network as an ONNX program in fp32, with what student.onnx says of itself."""
    onnx = import_module("onnx")
    plain = contiguous_copy(network).eval().requires_grad_(False)
    program = onnx.load_from_string(to_delivered_onnx(plain, torch.zeros(2, *dataset.image_shape)))
    program.metadata_props.extend(onnx.load_from_string(whole).metadata_props)
    content: bytes = program.SerializeToString()
    return content


def _validated(content: bytes, dataset: Dataset) -> dict[str, Any]:
    hits = _hits(_Running(load_onnx(content)), dataset, dataset.validation_batches)
    return {"validation_top1": hits.percent()["top1"], "validation_images": hits.images}


def _tested(content: bytes, dataset: Dataset) -> dict[str, Any]:
    hits = _hits(_Running(load_onnx(content)), dataset, dataset.test_batches)
    return {"top1": hits.percent()["top1"], "test_images": hits.images}


def _top1(network: nn.Module, dataset: Dataset) -> float | None:
    """Return the accuracy of a network on the validation images by which its program is judged, in percent."""
    return _hits(network, dataset, dataset.validation_batches).percent()["top1"]


def _hits(network: nn.Module, dataset: Dataset, batches: Callable[[int], Iterator[Batch]]) -> Hits:
    size = images_at_a_time(dataset.image_shape)
    return count_hits(network, islice(batches(size), max(1, COUNTED // size)))


def _latency(config: JobConfig, programs: Mapping[str, bytes]) -> dict[str, Any]:
    runtime = int8_runtime_of_job(config)
    how = {"runtime": runtime.name, "threads": runtime.threads, "precision": runtime.precision}
    batches = {}
    for size in sorted({*BATCHES, config.deploy.batch}):
        rounds = compared([programs["teacher"], programs["student"]], size, LIMIT_S, **how)
        batches[str(size)] = facts(*map(summary, rounds))
    return runtime.environment | {"batches": batches}


def tell_int8(context: Context, metrics: Mapping[str, Any]) -> None:
    """Say what INT8 programs cost, and how they compare; where the student loses more than noise, that too."""
    found = metrics.get("int8") or {}
    for one in (found.get(side) or {} for side in INT8_FILES):
        if one.get("status") == "failed":
            log.warning("%s: not written; %s", one["file"], one["reason"])
    student, validation = found.get("student", {}), metrics["student"]["validation"]
    if student.get("status") != "ok":
        return
    before, after = validation["top1"].get(metrics["student"]["delivered"]), student["validation_top1"]
    images = show_count(student["validation_images"], "validation image")
    context.say(f"{student['file']}: {show(after, '{:.2f} %')} of {images}, {show(before, '{:.2f} %')} in fp32")
    if "ms" in student:
        times = ", ".join(f"{form} {ms:.3f} ms" for form, ms in student["ms"].items())
        context.say(f"{student['file']}: separable convolutions in the form that is faster in INT8: {times}")
    if "training" in student:
        _tell_training(context, student)
    for size, one in (found.get("latency") or {}).get("batches", {}).items():
        own, its = (one[side]["median_ms"] for side in ("student", "teacher"))
        context.say(f"int8, batch {size}: {own:.3f} ms, the teacher {its:.3f} ms")
    if before is not None and after is not None and before - after > NOTICED:
        log.warning(
            "%s: INT8 takes %.2f points of validation accuracy; student.onnx is whole", student["file"], before - after
        )


def _tell_training(context: Context, student: Mapping[str, Any]) -> None:
    training = student["training"]
    if "reason" in training:
        log.warning("%s: no block of it could be trained for INT8: %s", student["file"], training["reason"])
        return
    top1 = ", ".join(f"{name} {show(one, '{:.2f} %')}" for name, one in training["validation_top1"].items())
    context.say(
        f"{student['file']}: {', '.join(training['blocks'])} lose most by INT8 and were trained for it, "
        f"{show_count(training['steps'], 'step')} in {training['cpu_seconds']:.0f} CPU s; "
        f"{training['kept']} is kept (validation images: {top1})"
    )
