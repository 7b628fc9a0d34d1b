"""The assemble stage of the job, and the student networks that later stages load from the run directory."""

from __future__ import annotations

import time
from typing import Any

from safetensors.torch import load, save
from torch import nn

from distill.blocks.memory_format import to_channels_last
from distill.data import Dataset
from distill.errors import DistillError
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.job.reuse import TEACHER
from distill.observability.numbers import show_count
from distill.recipes import Changes, Recipe
from distill.storage.aliases import load_state
from distill.storage.checkpoint import contiguous
from distill.storage.files import write_bytes
from distill.storage.ledger import Ledger, unit_file
from distill.student.assemble import assemble, in_a_row, recalibrate, remembering_norms


def assemble_student(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> list[str]:
    """Write assembled.safetensors (the blocks as they were trained) and recalibrated.safetensors (batch norms anew, by
    whole batches on rank 0, so that they do not depend on the ranks). Returns the names of those that differ."""

    def work() -> dict[str, Any]:
        start = time.monotonic()
        ledger = Ledger(context.run.path, origin=context.run.origin(TEACHER))
        weights = {number: ledger.weights(number) for number in sorted(blocks.units)}
        student = assemble(teacher, changed=_changed(blocks), blocks=weights.values())
        modules = {
            one.input: blocks.student(number, weights.get(number, {})) for number, one in blocks.candidates.items()
        }
        if not in_a_row(student, blocks.chain, modules, dataset.train_batch(0).images):
            raise DistillError(
                "the assembled student is not its trained blocks in a row: it gives something else for the first "
                "batch; the network's code reaches layers in other ways than by calling them: leave out their blocks "
                "(blocks.exclude)"
            )
        save_network(context, "assembled", student)
        to_channels_last(student, context.device)
        batches = context.config.assemble.batchnorm_batches
        norms = len(remembering_norms(student)) if batches > 0 else 0
        if norms > 0:
            recalibrate(student, (batch.images for batch in dataset.train_batches(0, batches)))
        save_network(context, "recalibrated", student)
        done = f"re-estimated on {show_count(batches, 'batch')}" if norms else "not re-estimated"
        context.say(f"assembled {show_count(len(weights), 'student block')}; batch norms {done}")
        return {"seconds": time.monotonic() - start, "batch_norms_re_estimated": norms}

    made = ["assembled.safetensors", "recalibrated.safetensors"]
    used = [TEACHER, *map(unit_file, blocks.units)]
    record = context.lead("assemble", work, made=made, used=used)
    return ["assembled", "recalibrated"] if record["batch_norms_re_estimated"] else ["assembled"]


def save_network(context: Context, name: str, network: nn.Module) -> None:
    """Write a network's state dict as NAME.safetensors of the run directory."""
    write_bytes(context.run.path / f"{name}.safetensors", save(contiguous(network.state_dict())))


def load_student_state(context: Context, name: str, teacher: nn.Module, blocks: Blocks) -> nn.Module:
    """Return the student with the weights of NAME.safetensors, on the device, in eval mode."""
    student = assemble(teacher, changed=_changed(blocks), blocks=())
    load_state(student, load(context.run.read(f"{name}.safetensors")))
    to_channels_last(student, context.device)
    return student.eval()


def _changed(blocks: Blocks) -> list[tuple[Recipe, Changes]]:
    return [(one.recipe, one.changes) for one in blocks.in_order]
