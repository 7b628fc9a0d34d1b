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

JUDGED, WRITTEN = "assemble/judged", "assemble/written"  # what is said of blocks, and of recalibrated.safetensors
EXACT = 1e-7  # a relative error that is rounding

State = Mapping[str, Tensor]


def assemble_student(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> list[str]:
    """Write assembled.safetensors (the blocks as they were trained, or as they began where that was better) and
    recalibrated.safetensors (fitted to one another, batch norms anew). Every rank must call: each makes some of the
    forms that the student may have, a form whole, so that nothing depends on the ranks. Returns the names of those that
    differ."""
    record = context.completed("assemble")
    if record is None:
        record = _assemble(context, dataset, teacher, blocks)
    return ["assembled", "recalibrated"] if record["chosen"] != AS_IT_IS else ["assembled"]


def _assemble(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> dict[str, Any]:
    start = time.monotonic()
    weights, errors = _kept_weights(context, dataset, blocks)
    if context.leads:
        save_network(context, "assembled", _put_together(dataset, teacher, blocks, weights))
    best, maker, record = reconcile(context, dataset, teacher, blocks, _starts(context, weights, errors))
    if best is not None:
        save_network(context, "recalibrated", best)

    def work() -> dict[str, Any]:
        context.control.wait(WRITTEN, peer=maker, purpose="the reconciled student")
        fitted = "; ".join(f"{name} {show(top1, '{:.2f} %')}" for name, top1 in record["validation_top1"].items())
        context.say(
            f"assembled {show_count(len(weights), 'student block')}, {record['chosen']} is best on validation images "
            f"({fitted})"
        )
        gone_back = {blocks.units[number].name: pair for number, pair in errors.items() if not pair[1] <= pair[0]}
        return {"seconds": time.monotonic() - start, "gone_back": gone_back, **record}

    if best is not None:
        context.control.set(WRITTEN, True)
    made = ["assembled.safetensors", "recalibrated.safetensors"]
    used = [TEACHER, *map(unit_file, blocks.units)]
    return dict(context.lead("assemble", work, made=made, used=used))


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
    the units that were trained the errors on these images before and after. Rank 0 judges, and all take its word."""
    ledger = Ledger(context.run.path, origin=context.run.origin(TEACHER))
    if context.leads:
        first, errors = _judged(context, dataset, blocks, ledger)
        context.control.set(JUDGED, {"first": first, "errors": errors})
    told = context.control.wait(JUDGED, peer=0, purpose="errors of blocks")
    kept: dict[int, State] = {
        number: first_weights(context, number) if number in told["first"] else ledger.weights(number)
        for number in sorted(blocks.units)
    }
    return kept, {int(number): (before, after) for number, (before, after) in told["errors"].items()}


def _judged(
    context: Context, dataset: Dataset, blocks: Blocks, ledger: Ledger
) -> tuple[list[int], dict[int, tuple[float, float]]]:
    """Return the units that go back to their first weights; and of those that were trained the errors before and
    after."""
    first: list[int] = []
    errors: dict[int, tuple[float, float]] = {}
    images = OnTheWay(blocks.chain, lambda: held_out_images(dataset))
    before = relative_errors(context)
    for number, unit in sorted(blocks.units.items()):
        if number not in before or ledger.entries[number].steps == 0:
            continue
        if before[number] < EXACT:  # a block that only gives fewer channels: nothing was to be learnt
            first.append(number)
            continue
        module = blocks.student(number, ledger.weights(number))
        to_channels_last(module, context.device)
        error = error_of(blocks, number, module.eval(), images)
        errors[number] = before[number], error
        if not error <= before[number]:
            first.append(number)
            log.warning(
                "block %s: training has made it worse on held-out images (relative error %.3g from %.3g): it goes back "
                "to its first weights; lower distill.lr or raise distill.steps",
                unit.name, error, before[number],
            )  # fmt: skip
    return first, errors


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
