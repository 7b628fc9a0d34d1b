"""Wiring of the deployment's measurements: the runtime that the settings name, and how fast what is delivered is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.config.choices import Precision
from distill.config.schema import JobConfig
from distill.deployment.forms import BRANCHES, REPEATED, faster_form, forms_of
from distill.deployment.measure import Timing, in_turn, piece_key, summary
from distill.deployment.runtimes import RUNTIMES, OnnxRuntime, ReadsOnnx, Runtime, Source, runtime_of
from distill.deployment.stopwatch import Stopwatch
from distill.deployment.tables import KeptHere, MeasuredElsewhere, Timings
from distill.job.context import Context
from distill.storage.files import read_bytes
from distill.storage.paths import expanded

log = logging.getLogger(__name__)

BATCHES = (1, 64)  # that everybody asks about, besides deploy.batch
MISSED = 0.03  # of the teacher's time, beyond a budget: more than measurements differ by
FILES = {"teacher": "teacher.onnx", "student": "student.onnx"}
INT8_FILES = {"teacher": "teacher_int8.onnx", "student": "student_int8.onnx"}


def runtime_of_job(config: JobConfig) -> Runtime:
    """Return the runtime that the section deploy asks for. Raises ConfigError where it cannot be had here."""
    deploy = config.deploy
    elsewhere = table_of_job(config)
    name = deploy.runtime.name if deploy.runtime is not None else None
    if elsewhere is not None:
        elsewhere.check({"runtime": name, "threads": deploy.threads, "precision": deploy.precision.name})
        name = str(elsewhere.environment["runtime"])
    return runtime_of(name, threads=deploy.threads, precision=deploy.precision.name, device=deploy.device.name)


def table_of_job(config: JobConfig) -> MeasuredElsewhere | None:
    """Return the table of another device that deploy.table names."""
    return MeasuredElsewhere(expanded(config.deploy.table)) if config.deploy.table else None


def timings_of_job(config: JobConfig) -> Timings:
    """Return where timings of chains come from: another device's table, or those of this machine."""
    return table_of_job(config) or KeptHere(runtime_of_job(config).environment)


def int8_runtime_of_job(config: JobConfig) -> Runtime:
    """Return what INT8 programs are timed in: the job's runtime where that reads ONNX, else ONNX Runtime."""
    name = config.deploy.runtime.name if config.deploy.runtime is not None else None
    reads_onnx = name is not None and issubclass(RUNTIMES[name], ReadsOnnx)
    chosen = name if reads_onnx else OnnxRuntime.name
    return runtime_of(chosen, threads=config.deploy.threads, precision="int8", device="cpu")


def int8_form(
    config: JobConfig, student: nn.Module, *, image_shape: tuple[int, ...]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the student in the form that is faster in INT8, and what was found (forms.py). Where INT8 is what it is
    deployed in, that is the form of student.onnx too."""
    if config.deploy.precision is Precision.int8:
        return form_to_export(config, student, image_shape=image_shape)
    runtime = int8_runtime_of_job(config)
    stopwatch = Stopwatch(runtime=runtime, timings=KeptHere(runtime.environment))
    return faster_form(student, stopwatch, image_shape=image_shape, batch=config.deploy.batch)


def form_to_export(
    config: JobConfig, student: nn.Module, *, image_shape: tuple[int, ...]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the student, or the same function in a form that is faster in the runtime that will run it, and what was
    found (forms.py); nothing where it is not ONNX that runs."""
    runtime, elsewhere = runtime_of_job(config), table_of_job(config)
    if not isinstance(runtime, ReadsOnnx):
        return student, {}
    batch = config.deploy.batch
    if elsewhere is not None:  # the file must be the one that was measured there
        for name, form in zip((REPEATED, BRANCHES), forms_of(student), strict=False):
            source = runtime.whole(form, torch.zeros(2, *image_shape))
            if elsewhere.known(piece_key(source.key, batch)) is not None:
                return form, {"form": name} if form is not student else {}
    stopwatch = Stopwatch(runtime=runtime, timings=KeptHere(runtime.environment))
    return faster_form(student, stopwatch, image_shape=image_shape, batch=batch)


def delivered_latency(
    context: Context,
    teacher: nn.Module,
    student: nn.Module,
    exports: Mapping[str, Mapping[str, Any]],
    *,
    image_shape: tuple[int, ...],
) -> dict[str, Any]:
    """Return the section `latency` of metrics.json: how fast teacher and student are, measured in turn, in the runtime
    that is asked for. ONNX runtimes run the delivered files. Where these are missing `batches` is empty and `reason`
    says why."""
    config = context.config
    runtime, elsewhere = runtime_of_job(config), table_of_job(config)
    found = {**runtime.environment, "device": config.deploy.device.name, "batch": config.deploy.batch}
    batches = sorted({*BATCHES, config.deploy.batch})
    if not isinstance(runtime, ReadsOnnx):
        sample = torch.zeros(2, *image_shape)
        sources = [runtime.source(network, sample) for network in (teacher, student)]
        return found | {"batches": {str(size): _measured(runtime, sources, size, image_shape) for size in batches}}
    lacking = [one for one in (exports["teacher_onnx"], exports["onnx"]) if one["status"] != "ok"]
    if lacking:
        return found | {"batches": {}, "reason": f"{lacking[0]['file']}: {lacking[0]['reason']}"}
    sources = [_delivered(runtime, context.run.path, side) for side in FILES]
    found["files"] = FILES
    if elsewhere is not None:
        told = {str(size): one for size in batches if (one := _looked_up(elsewhere, sources, size)) is not None}
        if told:
            return found | elsewhere.environment | {"batches": told, "table": str(Path(elsewhere.path).name)}
        log.warning("latency: %s has not these files: they are measured here", elsewhere.path)
    return found | {"batches": {str(size): _measured(runtime, sources, size, image_shape) for size in batches}}


def _delivered(runtime: ReadsOnnx, folder: Path, side: str) -> Source:
    """Return a delivered program, in INT8 that which was calibrated, where it was written."""
    int8 = folder / INT8_FILES[side]
    return runtime.source_of(read_bytes(folder / FILES[side]), read_bytes(int8) if int8.exists() else None)


def _measured(runtime: Runtime, sources: list[Source], size: int, image_shape: tuple[int, ...]) -> dict[str, Any]:
    sample = torch.zeros(size, *image_shape)
    rounds = in_turn([runtime.start(source, sample) for source in sources])
    return facts(*(summary(seconds) for seconds in rounds))


def _looked_up(elsewhere: MeasuredElsewhere, sources: list[Source], size: int) -> dict[str, Any] | None:
    """Return what another device's table has on both networks, where it has them."""
    teacher, student = (piece_key(source.key, size) for source in sources)
    known = elsewhere.known(teacher), elsewhere.known(student)
    return None if None in known else facts(*known)  # type: ignore[arg-type]


def tell_missed_latency(metrics: Mapping[str, Any]) -> None:
    """Warn where the delivered student takes more of the teacher's time than its budget."""
    for one in (metrics.get("search") or {}).get("budgets", []):
        latency, measured = one["budget"].get("latency"), one["measured"]
        if latency is None or "latency" not in measured:
            continue
        allowed = latency["limit"] / metrics["search"]["teacher"]["latency"]
        found = measured["latency"] / measured["latency_of_teacher"]
        if found > allowed + MISSED:
            log.warning(
                "search.budget.latency=%s: the delivered student takes %.3f of its teacher's time, %.3f was asked for",
                latency["asked"], found, allowed,
            )  # fmt: skip


def facts(teacher: Timing, student: Timing) -> dict[str, Any]:
    """Return both timings and their ratio as JSON values."""
    ratio = student.median_ms / teacher.median_ms
    return {"teacher": asdict(teacher), "student": asdict(student), "ratio": ratio}
