"""The assemble stage of the job, and the student networks that later stages load from the run directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from distill.blocks.memory_format import to_channels_last
from distill.data import Dataset
from distill.errors import DistillError
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.job.first_weights import OnTheWay, error_of, first_weights, held_out_images, relative_errors
from distill.job.reconcile import AS_IT_IS, TRAINED, UNTRAINED, reconcile
from distill.job.reuse import TEACHER
from distill.observability.numbers import show, show_count
from distill.storage.aliases import load_state
from distill.storage.checkpoint import contiguous
from distill.storage.files import write_bytes
from distill.storage.ledger import Ledger, unit_file
from distill.student.assemble import assemble, in_a_row

log = logging.getLogger(__name__)

EXACT = 1e-7  # a relative error that is rounding

State = Mapping[str, Tensor]


def assemble_student(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> list[str]:
    """Write assembled.safetensors (the blocks as they were trained, or as they began where that was better) and
    recalibrated.safetensors (fitted to one another, batch norms anew), all on rank 0, so that nothing depends on the
    ranks. Returns the names of those that differ."""

    def work() -> dict[str, Any]:
        start = time.monotonic()
        weights, errors = _kept_weights(context, dataset, blocks)
        student = _put_together(dataset, teacher, blocks, weights)
        save_network(context, "assembled", student)
        best, record = reconcile(context, dataset, teacher, blocks, _starts(context, weights, errors))
        save_network(context, "recalibrated", best)
        fitted = "; ".join(f"{name} {show(top1, '{:.2f} %')}" for name, top1 in record["validation_top1"].items())
        context.say(
            f"assembled {show_count(len(weights), 'student block')}, {record['chosen']} is best on validation images "
            f"({fitted})"
        )
        gone_back = {blocks.units[number].name: pair for number, pair in errors.items() if not pair[1] <= pair[0]}
        return {"seconds": time.monotonic() - start, "gone_back": gone_back, **record}

    made = ["assembled.safetensors", "recalibrated.safetensors"]
    used = [TEACHER, *map(unit_file, blocks.units)]
    record = context.lead("assemble", work, made=made, used=used)
    return ["assembled", "recalibrated"] if record["chosen"] != AS_IT_IS else ["assembled"]


def _starts(
    context: Context, weights: Mapping[int, State], errors: Mapping[int, tuple[float, float]]
) -> dict[str, Mapping[int, State]]:
    """Return by name the weights with which there may be a best student: as trained; and, where training has taken less
    than a quarter of some unit's error away, as they were before. Blocks that are better one by one can be worse in a
    row, and a short training must not end worse than none. (200 steps take a quarter to a half: docs/results.md.)"""
    if all(after <= 0.75 * before for before, after in errors.values()):
        return {TRAINED: weights}
    # The later of equals is taken.
    return {UNTRAINED: {number: first_weights(context, number) for number in weights}, TRAINED: weights}


def _kept_weights(
    context: Context, dataset: Dataset, blocks: Blocks
) -> tuple[dict[int, State], dict[int, tuple[float, float]]]:
    """Return every unit's weights: those trained, or where these are worse on held-out images, the first ones. And of
    the units that were trained the errors on these images before and after."""
    ledger = Ledger(context.run.path, origin=context.run.origin(TEACHER))
    kept: dict[int, State] = {}
    errors: dict[int, tuple[float, float]] = {}
    images = OnTheWay(blocks.chain, lambda: held_out_images(dataset))
    before = relative_errors(context)
    for number, unit in sorted(blocks.units.items()):
        kept[number] = ledger.weights(number)
        if number not in before or ledger.entries[number].steps == 0:
            continue
        if before[number] < EXACT:  # a block that only gives fewer channels: nothing was to be learnt
            kept[number] = first_weights(context, number)
            continue
        module = blocks.student(number, kept[number])
        to_channels_last(module, context.device)
        error = error_of(blocks, number, module.eval(), images)
        errors[number] = before[number], error
        if not error <= before[number]:
            kept[number] = first_weights(context, number)
            log.warning(
                "block %s: training has made it worse on held-out images (relative error %.3g from %.3g): it goes back "
                "to its first weights; lower distill.lr or raise distill.steps",
                unit.name, error, before[number],
            )  # fmt: skip
    return kept, errors


def _put_together(dataset: Dataset, teacher: nn.Module, blocks: Blocks, weights: Mapping[int, State]) -> nn.Module:
    """Return the student network. Raises DistillError where it is not its blocks in a row."""
    student = assemble(teacher, changed=blocks.changed, blocks=weights.values())
    if not in_a_row(student, blocks.chain, blocks.students(weights), dataset.train_batch(0).images):
        raise DistillError(
            "the assembled student is not its trained blocks in a row: it gives something else for the first "
            "batch; the network's code reaches layers in other ways than by calling them: leave out their blocks "
            "(blocks.exclude)"
        )
    return student


def save_network(context: Context, name: str, network: nn.Module) -> None:
    """Write a network's state dict as NAME.safetensors of the run directory."""
    write_bytes(context.run.path / f"{name}.safetensors", save(contiguous(network.state_dict())))


def load_student_state(context: Context, name: str, teacher: nn.Module, blocks: Blocks) -> nn.Module:
    """Return the student with the weights of NAME.safetensors, on the device, in eval mode."""
    student = assemble(teacher, changed=blocks.changed, blocks=())
    load_state(student, load(context.run.read(f"{name}.safetensors")))
    to_channels_last(student, context.device)
    return student.eval()
