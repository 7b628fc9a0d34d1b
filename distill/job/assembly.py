"""The assemble stage of the job, and the student networks that later stages load from the run directory."""

from __future__ import annotations

import time
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from distill.assemble import assemble, recalibrate
from distill.checkpoint import contiguous
from distill.data import Dataset
from distill.files import write_bytes
from distill.job.context import Context
from distill.job.materials import Blocks
from distill.job.reuse import TEACHER
from distill.ledger import Ledger, block_file
from distill.report.markup import show_count


def assemble_student(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> None:
    """Write assembled.safetensors (the blocks as they were trained) and recalibrated.safetensors (batch norms anew)."""

    def work() -> dict[str, Any]:
        start = time.monotonic()
        ledger = Ledger(context.run.path, origin=context.run.origin(TEACHER))
        weights = [ledger.weights(block) for block in sorted(blocks.replaced)]
        student = assemble(teacher, replaced=blocks.replaced_paths, recipe=blocks.recipe, blocks=weights)
        save_network(context, "assembled", student)
        student.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        batches = context.config.assemble.batchnorm_batches
        if batches > 0:
            recalibrate(student, (batch.images for batch in dataset.train_batches(0, batches)))
        save_network(context, "recalibrated", student)
        norms = f"batch norms re-estimated on {show_count(batches, 'batch')}"
        context.say(f"assembled {show_count(len(weights), 'student block')}; {norms}")
        return {"seconds": time.monotonic() - start}

    made = ["assembled.safetensors", "recalibrated.safetensors"]
    context.lead("assemble", work, made=made, used=[TEACHER, *map(block_file, blocks.replaced)])


def save_network(context: Context, name: str, network: nn.Module) -> None:
    """Write a network's state dict as NAME.safetensors of the run directory."""
    write_bytes(context.run.path / f"{name}.safetensors", save(contiguous(network.state_dict())))


def load_student_state(context: Context, name: str, teacher: nn.Module, blocks: Blocks) -> nn.Module:
    """Return the student with the weights of NAME.safetensors, on the device, in eval mode."""
    student = assemble(teacher, replaced=blocks.replaced_paths, recipe=blocks.recipe, blocks=())
    student.load_state_dict(load(context.run.read(f"{name}.safetensors")))
    student.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return student.eval()
