"""The last stage of the job: the delivered student's files, what they say of it, and the result that is printed."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.choices import CropMode, Stage
from distill.config.fingerprint import fingerprint
from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.errors import ConfigError, DistillError
from distill.job.assemble import load_student_state
from distill.job.blocks import Blocks
from distill.job.call_memory import memory_of_call
from distill.job.context import Context
from distill.job.first_weights import relative_errors
from distill.job.halving import STAGES as HALVING
from distill.job.int8 import deliver_int8, tell_int8
from distill.job.latency import delivered_latency, form_to_export, tell_missed_latency
from distill.job.reuse import TEACHER
from distill.job.seconds import seconds_of
from distill.job.teacher import architecture_of
from distill.job.time_budget import epochs_of
from distill.launch import provenance
from distill.machine.host import available_cores
from distill.observability.energy.joules import joules_per_image, summarize
from distill.reporting import result_table, write_report
from distill.reporting.tables import STUDENTS
from distill.storage.files import read_json, write_json
from distill.storage.ledger import Entry, Ledger
from distill.storage.run_directory import RunDirectory
from distill.student.evaluate import measure_network
from distill.student.files import StudentCard, save_student
from distill.student.programs import NOT_WANTED, deliver_programs, deliver_teacher, not_wanted

log = logging.getLogger(__name__)

STAGE = "deliver"
COMPARISON_BATCH, COMPARISON_IMAGES = 64, 256


def refuse_unfinished(config: JobConfig, facts: Mapping[str, Any], run: RunDirectory) -> None:
    """Raise unless this is the configuration's run, complete up to the delivery; before anything is read or written.

    Every rank looks for itself, so that all stop at once.
    """
    if not (run.path / "resolved.yaml").exists():
        allowed = "the directory of a finished run; the same command without stage=deliver makes one"
        raise ConfigError("run.dir", str(run.path), allowed)
    run.refuse_others(facts)
    stages = ["teacher", "distill", "assemble", "finetune", "evaluate"]
    skipped = {"teacher": config.teacher.fit_epochs, "finetune": epochs_of(config, run)}
    for stage in stages:
        if skipped.get(stage) != 0 and run.result(stage) is None:
            raise DistillError(
                f"{run.path}: nothing to deliver yet, its stage {stage} is not complete; "
                f"finish it with: python -m distill run={run.path}"
            )
    for stage, damage in run.damaged():
        if stage != STAGE:
            raise DistillError(f"{damage}; its stage {stage} is done again by: python -m distill run={run.path}")


def deliver(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> None:
    """Write the student, its programs, metrics.json and report.html, and print teacher against student.

    Rank 0 works alone. What is complete is only printed again, unless stage=deliver asks for it.
    """
    if not context.leads:
        return
    run, config = context.run, context.config
    if config.stage is Stage.deliver:
        run.reopen(STAGE)
    start = time.perf_counter()
    if run.result(STAGE) is None:
        student = load_student_state(context, run.result("evaluate")["delivered"], teacher, blocks)
        card = StudentCard(
            architecture=architecture_of(config, len(dataset.classes)),
            blocks=[one.facts for one in blocks.in_order],
            image_size=config.data.side,
            mean=config.mean,
            std=config.std,
            classes=dataset.classes,
            resize_shorter_side=dataset.evaluation_side,
            exif_orientation=config.data.exif_orientation,
            resize_filter=f"{config.data.interpolation.name}, antialiased (as PIL resizes)",
            aspect="squashed" if config.data.crop_mode is CropMode.squash else "kept",
        )
        save_student(run.path, student, card)
        exports = _export(context, dataset, teacher, student, card)
        metrics = _metrics(context, dataset, teacher, student, blocks) | {"exports": exports}
        metrics["int8"] = deliver_int8(context, dataset, student, exports)
        metrics["latency"] = delivered_latency(context, teacher, student, exports, image_shape=dataset.image_shape)
        if config.search.on:
            training = [found for stage in HALVING if (found := run.result(stage)) is not None]
            metrics["search"] = _search(run.result("search"), run.result("candidates"), training, metrics)
            if config.search.budget.memory is not None:
                called = memory_of_call(student, dataset.image_shape, config.deploy.batch)
                metrics["search"]["budgets"][0]["measured"]["memory"] = called
        metrics["seconds"] = seconds_of(context, **{STAGE: time.perf_counter() - start})
        write_json(run.path / "metrics.json", metrics)
        write_report(run.path)
        made = ["student.safetensors", "student.json", "metrics.json"]
        written = [*exports.values(), *(metrics["int8"].get(side, {}) for side in ("teacher", "student"))]
        made += [one["file"] for one in written if one.get("status") == "ok"]
        states = [name for name in STUDENTS if name in run.result("evaluate")]  # all: the choice may be another one now
        used = [TEACHER, *(f"{name}.safetensors" for name in states)]
        run.complete(STAGE, {"student": "student.safetensors"}, made=made, used=used)
    metrics = read_json(run.path / "metrics.json")
    context.console.print(result_table(metrics))
    for block in metrics["blocks"]:
        if block["status"] != "finished":
            log.warning(
                "block %s %s: the student has its weights of step %d", block["name"], block["status"], block["steps"]
            )
    _tell_exports(context, metrics.get("exports", {}))
    tell_int8(context, metrics)
    tell_missed_latency(metrics)
    context.say(f"student: {run.path / 'student.safetensors'}")
    context.say(f"report:  {run.path / 'report.html'}")


def _export(
    context: Context, dataset: Dataset, teacher: nn.Module, student: nn.Module, card: StudentCard
) -> dict[str, dict[str, Any]]:
    """Write the programs of student and teacher; return what became of them."""
    folder, images, wanted = context.run.path, _some_test_images(dataset), context.config.deploy.programs
    if "onnx" not in wanted:
        exports = deliver_programs(folder, student, card, images, wanted=wanted)
        return exports | {"teacher_onnx": not_wanted(folder, "teacher.onnx")}
    form, found = form_to_export(context.config, student, image_shape=dataset.image_shape)
    exports = deliver_programs(folder, student, card, images, wanted=wanted, onnx_form=form)
    if exports["onnx"]["status"] == "ok":
        exports["onnx"] |= found
    return exports | {"teacher_onnx": deliver_teacher(folder, teacher, replace(card, blocks=[]), images)}


def _some_test_images(dataset: Dataset) -> list[Tensor]:
    """Return the first test images, enough of them to see a difference between two programs."""
    batches: list[Tensor] = []
    for batch in dataset.test_batches(COMPARISON_BATCH):
        batches.append(batch.images)
        if sum(map(len, batches)) >= COMPARISON_IMAGES:
            break
    return batches


def _tell_exports(context: Context, exports: Mapping[str, Mapping[str, Any]]) -> None:
    for record in exports.values():
        if record["status"] == "ok":
            network = record["file"].partition(".")[0]
            context.say(
                f"{record['file']}: logits within {record['max_abs_difference']:.1e} of the eager {network}'s, same "
                f"first guess on {record['top1_agreement']:.2f} % of {record['images']} test images"
            )
            if "ms" in record:
                times = ", ".join(f"{form} {ms:.2f} ms" for form, ms in record["ms"].items())
                context.say(
                    f"{record['file']}: separable convolutions in the faster form of two, in {record['runtime']} at "
                    f"batch {record['batch']}: {times}"
                )
        elif record["status"] == "not installed":
            context.say(f"{record['file']}: not written; {record['reason']}")
        elif record["status"] != NOT_WANTED:
            log.warning("%s: not written; %s", record["file"], record["reason"])


def _metrics(
    context: Context, dataset: Dataset, teacher: nn.Module, student: nn.Module, blocks: Blocks
) -> dict[str, Any]:
    run, ledger = context.run, Ledger(context.run.path, origin=context.run.origin(TEACHER))
    accuracy = run.result("evaluate")
    modules = dict(teacher.named_modules())
    replaced = blocks.replaced_paths
    assembled = accuracy["assembled"]
    student_facts = measure_network(student, image_shape=dataset.image_shape, device=context.device) | {
        **accuracy[accuracy["delivered"]],
        "delivered": accuracy["delivered"],
        "validation": accuracy["validation"],
        "top1_assembled": assembled["top1"],
        "top1_recalibrated": accuracy.get("recalibrated", assembled)["top1"],
        "top1_finetuned": accuracy.get("finetuned", {}).get("top1"),
        "replaced_params": _count(student, replaced),
    }
    return {
        "teacher": measure_network(teacher, image_shape=dataset.image_shape, device=context.device)
        | accuracy["teacher"]
        | {"name": context.config.teacher.name, "replaced_params": sum(_count(modules[path]) for path in replaced)},
        "student": student_facts,
        "answers": accuracy.get("answers"),
        "distill": run.result("distill"),
        "assemble": run.result("assemble"),
        "finetune": run.result("finetune"),
        "blocks": [_block(context, blocks, entry) for _, entry in sorted(ledger.entries.items())],
        "data": {
            "name": context.config.data.name.name,
            "train_images": dataset.num_train,
            "validation_images": dataset.num_validation,
            "test_images": dataset.num_test,
            "skipped_images": list(dataset.skipped),
        },
        "environment": {
            **provenance.of_place(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "cpu",
            "cores": available_cores(),
            "threads": torch.get_num_threads(),
        },
        "run": provenance.of_job(context.started_s),
        "energy": _energy(context, ledger, batch_size=dataset.batch_size),
        "fingerprint": fingerprint(context.identity),
        "seed": context.config.seed,
    }


def _block(context: Context, blocks: Blocks, entry: Entry) -> dict[str, Any]:
    """What is told of a unit: how it was made, what it holds, how it began and how it was trained."""
    return asdict(entry) | {
        "recipe": blocks.candidates[entry.unit].name,
        "params": _count(blocks.build(entry.unit)),
        "rel_error_start": relative_errors(context).get(entry.unit),
    }


def _search(
    result: Mapping[str, Any],
    scoring: Mapping[str, Any],
    training: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """What is told of the choice under budgets: what was asked for, what was chosen and predicted, what has come of it,
    all candidates with their scores, and the rounds in which they were trained."""
    measured = {name: metrics["student"][name] for name in ("params", "flops", "bytes", "top1")}
    latency = metrics["latency"]
    called = latency["batches"].get(str(latency["batch"]))
    if called is not None:
        measured |= {"latency": called["student"]["median_ms"], "latency_of_teacher": called["teacher"]["median_ms"]}
    chosen = {name: result[name] for name in ("budget", "chosen", "predicted", "judged", "delivered", "more")}
    return {
        "budgets": [{**chosen, "measured": measured}],
        "teacher": result["teacher"],
        "candidates": result["pool"],
        "seconds": result["seconds"],
        "scoring": {name: scoring.get(name) for name in ("images", "seconds", "cpu_seconds", "taken_from")},
        "training": [
            {"trained": len(one["trained"]), **{name: one[name] for name in ("steps", "seconds", "cpu_seconds")}}
            for one in training
        ],
    }


def _energy(context: Context, ledger: Ledger, *, batch_size: int) -> dict[str, Any]:
    """What all attempts have spent up to the deliver stage, which is still running."""
    energy = summarize(context.run.path)
    for spent in (energy["stages"], *(device["joules"] for device in energy["devices"])):
        spent.pop(STAGE, None)  # a reading amid a long delivery
    images = batch_size * max((entry.steps for entry in ledger.entries.values()), default=0)
    return energy | {"images": images, "joules_per_image": joules_per_image(energy, images)}


def _count(module: nn.Module, paths: list[str] | None = None) -> int:
    """Parameters of a module, or of its submodules at `paths`."""
    parts = [module] if paths is None else [module.get_submodule(path) for path in paths]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())
