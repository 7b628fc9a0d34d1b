"""Which student is delivered, as validation images decide; then the one evaluation on the test split."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.errors import ConfigError, DistillError
from distill.job.assemble import load_student_state
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.observability.numbers import show, show_count
from distill.reporting.tables import STUDENTS
from distill.student.answers import answers_facts, compared, from_json, to_json
from distill.student.evaluate import Hits, best_of, count_hits, guesses_of, images_at_a_time

log = logging.getLogger(__name__)

FEW_IMAGES = 50  # half of them right: a standard error of 7 points
FIRST_GUESSES = 5  # top-5 says nothing where there are no more classes


def refuse_unjudged(config: JobConfig, dataset: Dataset) -> None:
    """Raise ConfigError where no student could be judged, at the beginning and not after hours of training: without
    test images, or with one class alone, of which every network is right."""
    assert dataset.num_test > 0, "an empty split is refused where it is listed"
    if len(dataset.classes) < 2:
        found = f"there is only {dataset.classes[0]}"
        raise ConfigError("data.root", config.data.root, f"images of at least 2 classes; {found}")


def warn_of_few_images(config: JobConfig, dataset: Dataset) -> None:
    """Warn where students, and epochs of fine-tuning, will be chosen by very few validation images."""
    if dataset.num_validation < FEW_IMAGES:
        log.warning(
            "validation: %s to choose the student by, which says its accuracy to within %.0f points (standard error); "
            "raise data.validation_fraction (%g)",
            show_count(dataset.num_validation, "image"),
            50 / math.sqrt(max(1, dataset.num_validation)),
            config.data.validation_fraction,
        )


def held_out_hits(context: Context, name: str, network: nn.Module, dataset: Dataset) -> Hits:
    """Return a network's hits on the validation images, each rank counting on its share; every rank must call it."""
    share = dataset.validation_batches(
        images_at_a_time(dataset.image_shape), part=context.rank, num_parts=context.world_size
    )
    return _hits_of_all(context, f"{name}, validation", count_hits(network, share))


def _hits_of_all(context: Context, name: str, own: Hits) -> Hits:
    return sum((Hits(**one) for one in _of_all(context, f"hits/{name}", asdict(own), f"accuracy of {name}")), Hits())


def _of_all(context: Context, key: str, own: Any, purpose: str) -> Iterator[Any]:
    """Yield what every rank has found, in the order of ranks, this one's among it."""
    context.control.set(f"{key}/{context.rank}", own)
    for rank in range(context.world_size):
        yield context.control.wait(f"{key}/{rank}", peer=rank, purpose=purpose)


def evaluate(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks, students: Sequence[str]) -> None:
    """Choose among these states of the student the one to deliver, by validation images; then count every network's
    hits on the test split, each rank on its share. Its labels are read here and, of programs in INT8, when these are
    delivered; nothing depends on them.
    """
    if context.completed("evaluate") is not None:
        return
    counted = _counted(context, dataset)
    held_out = {
        name: counted.get(name)
        or held_out_hits(context, name, load_student_state(context, name, teacher, blocks), dataset)
        for name in students
    }
    delivered = best_of(held_out)
    if delivered is None:
        raise DistillError(
            f"{context.run.path}: no student to deliver: the logits of all of them ({', '.join(students)}) hold nan or "
            "infinity on validation images; lower distill.lr, and see which blocks diverged in ledger.jsonl"
        )
    context.say(_verdict(delivered, held_out))
    results: dict[str, Any] = {"delivered": delivered, "validation": _facts(delivered, held_out)}
    networks = {"teacher": teacher} | {name: load_student_state(context, name, teacher, blocks) for name in students}
    share = dataset.test_batches(images_at_a_time(dataset.image_shape), part=context.rank, num_parts=context.world_size)
    guesses = guesses_of(networks, share)
    for name, own in guesses.items():
        hits = _hits_of_all(context, name, own.hits)
        results[name] = hits.percent() | {"images": hits.images}
        if len(dataset.classes) <= FIRST_GUESSES:
            results[name]["top5"] = None
    answers = to_json(compared(guesses["teacher"], guesses[delivered]))
    shares = _of_all(context, "answers", answers, "answers of teacher and student")
    results["answers"] = answers_facts(sum(map(from_json, shares), Counter()), dataset.classes)
    if context.leads:
        used = [f"{name}.safetensors" for name in ("teacher", *students)]
        context.run.complete("evaluate", results, used=used)


def _counted(context: Context, dataset: Dataset) -> dict[str, Hits]:
    """Return the hits on the validation images that fine-tuning has counted of what it has kept."""
    record = context.completed("finetune")
    if record is None or record["kept_epoch"] is None:
        return {}
    top1, images = record["epochs"][record["kept_epoch"] - 1]["validation_top1"], dataset.num_validation
    return {"finetuned": Hits(top1=round(top1 * images / 100), images=images)}


def _facts(delivered: str, held_out: Mapping[str, Hits]) -> dict[str, Any]:
    """What metrics.json says of the choice; an accuracy is null where logits were not finite."""
    top1 = {name: None if hits.not_finite else hits.percent()["top1"] for name, hits in held_out.items()}
    one = held_out[delivered]
    return {"images": one.images, "standard_error": one.standard_error if one.images else None, "top1": top1}


def _verdict(delivered: str, held_out: Mapping[str, Hits]) -> str:
    facts, one = _facts(delivered, held_out), held_out[delivered]
    if not one.images:
        return (
            f"student: {STUDENTS[delivered]} is delivered, the last of all: there are no validation images to choose by"
        )
    all_of_them = ", ".join(f"{STUDENTS[name]} {show(top1, '{:.2f} %')}" for name, top1 in facts["top1"].items())
    by = f"{show_count(one.images, 'validation image')} (standard error {one.standard_error:.1f} points)"
    return f"student: {STUDENTS[delivered]} is delivered, chosen by {by}: {all_of_them}"
