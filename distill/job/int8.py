"""INT8 programs of teacher and student: what they cost in accuracy, and how fast they are beside one another.

A student that is faster than its teacher in fp32 can be slower than its teacher in INT8, so that the teacher gets a
program too. Both are quantised statically, after distillation, by the same training images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.deployment.measure import LIMIT_S, compared, environment, summary
from distill.deployment.quantised import quantised
from distill.job.context import Context
from distill.job.latency import BATCHES, INT8_FILES, facts
from distill.observability.numbers import show, show_count
from distill.storage.files import write_bytes
from distill.student.evaluate import count_hits, images_at_a_time
from distill.student.programs import Program, in_one_line, load_onnx

log = logging.getLogger(__name__)

RUNTIME = "onnxruntime"
IMAGES, PART = 512, 64  # training images by whose activations ranges are set, and how many of them run at a time
FIT_FROM = 2000  # the first training batch of these: neither statistics nor fits have seen it
COUNTED = 10_000  # images of a split by which a program is judged, about: rank 0 is alone at that
NOTICED = 0.3  # points of validation accuracy that are more than noise
EXPORTS = {"teacher": "teacher_onnx", "student": "onnx"}  # what INT8 programs are made of, by side


class _Running(nn.Module):
    """A program where a network is expected."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    def forward(self, images: Tensor) -> Tensor:
        return self._program(images.cpu().contiguous()).to(images.device)


def deliver_int8(context: Context, dataset: Dataset, exports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write teacher_int8.onnx and student_int8.onnx beside the programs that they are made of (`exports`); return the
    section `int8` of metrics.json: what became of each, its accuracy, and the latency of both, measured in turn.

    A failure is a record, never an exception: what it is about is delivered already.
    """
    for name in INT8_FILES.values():
        (context.run.path / name).unlink(missing_ok=True)
    lacking = next((exports[export] for export in EXPORTS.values() if exports[export]["status"] != "ok"), None)
    if "int8" not in context.config.deploy.programs or lacking is not None:
        return {"reason": "not in deploy.programs" if lacking is None else f"{lacking['file']}: {lacking['reason']}"}
    images = list(_images(dataset))
    programs: dict[str, bytes] = {}
    found: dict[str, Any] = {"images": sum(map(len, images))}
    for side, name in INT8_FILES.items():
        try:
            found[side], programs[side] = _deliver(context, dataset, exports[EXPORTS[side]], name, images)
        except Exception as error:  # whatever quantiser and runtime raise
            found[side] = {"file": name, "status": "failed", "reason": in_one_line(error)}
    if len(programs) == len(INT8_FILES):
        try:
            found["latency"] = _latency(context.config, programs)
        except Exception as error:
            found["latency"] = {"batches": {}, "reason": in_one_line(error)}
    return found


def _images(dataset: Dataset) -> list[np.ndarray[Any, Any]]:
    parts: list[np.ndarray[Any, Any]] = []
    step = FIT_FROM
    while sum(map(len, parts)) < IMAGES:
        images = dataset.train_batch(step).images.cpu().contiguous()
        parts += [part.numpy() for part in torch.split(images, PART)]
        step += 1
    return parts


def _deliver(
    context: Context, dataset: Dataset, export: Mapping[str, Any], name: str, images: Sequence[np.ndarray[Any, Any]]
) -> tuple[dict[str, Any], bytes]:
    content = quantised((context.run.path / export["file"]).read_bytes(), images)
    network, size = _Running(load_onnx(content)), images_at_a_time(dataset.image_shape)
    batches = max(1, COUNTED // size)
    held_out = count_hits(network, islice(dataset.validation_batches(size), batches))
    tested = count_hits(network, islice(dataset.test_batches(size), batches))
    write_bytes(context.run.path / name, content)
    return {
        "file": name,
        "status": "ok",
        "bytes": len(content),
        "validation_top1": held_out.percent()["top1"],
        "validation_images": held_out.images,
        "top1": tested.percent()["top1"],
        "test_images": tested.images,
    }, content


def _latency(config: JobConfig, programs: Mapping[str, bytes]) -> dict[str, Any]:
    how = {"runtime": RUNTIME, "threads": config.deploy.threads, "precision": "int8"}
    batches = {}
    for size in sorted({*BATCHES, config.deploy.batch}):
        rounds = compared([programs["teacher"], programs["student"]], size, LIMIT_S, **how)
        batches[str(size)] = facts(*map(summary, rounds))
    return environment(RUNTIME, threads=config.deploy.threads, precision="int8") | {"batches": batches}


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
    for size, one in (found.get("latency") or {}).get("batches", {}).items():
        own, its = (one[side]["median_ms"] for side in ("student", "teacher"))
        context.say(f"int8, batch {size}: {own:.3f} ms, the teacher {its:.3f} ms")
    if before is not None and after is not None and before - after > NOTICED:
        log.warning(
            "%s: INT8 takes %.2f points of validation accuracy; student.onnx is whole", student["file"], before - after
        )
