"""The packed file of the delivered student: how small it is, and, where values were rounded, what that has cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from distill.blocks.chain import copied
from distill.config.choices import Packed
from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.job.context import Context
from distill.observability.numbers import show, show_count
from distill.storage.aliases import load_state
from distill.storage.packed import Kept, load_packed, save_packed
from distill.student.evaluate import count_hits, images_at_a_time
from distill.student.files import PACKED


def kept_values(config: JobConfig) -> Kept | None:
    """Return how values are to be kept in a packed file; None where there is to be none."""
    asked = config.deploy.packed or (Packed.exact if config.finetune.sparsity > 0 else None)
    return None if asked is None else Kept[asked.name]


def deliver_packed(
    context: Context, dataset: Dataset, student: nn.Module, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Write student.packed.safetensors, where it is asked for; return what metrics.json says of it: `packed_bytes` as
    stored, their share of those of the teacher's weights, and top-1 accuracy on test images with the values that the
    file gives. One of an earlier delivery goes."""
    path, kept = context.run.path / PACKED, kept_values(context.config)
    path.unlink(missing_ok=True)
    if kept is None:
        return {}
    size = save_packed(path, student.state_dict(), kept)
    top1 = metrics["student"]["top1"]
    if kept is not Kept.exact:
        read = copied(student)
        load_state(read, load_packed(path))
        top1 = count_hits(read, dataset.test_batches(images_at_a_time(dataset.image_shape))).percent()["top1"]
    return {"packed_bytes": size, "packed_share": size / metrics["teacher"]["bytes"], "packed_top1": top1}


def tell_packed(context: Context, metrics: Mapping[str, Any]) -> None:
    """Say how small the packed file is, and what accuracy its values have."""
    student = metrics["student"]
    if "packed_bytes" in student:
        context.say(
            f"{PACKED}: {show_count(student['packed_bytes'], 'byte')}, 1/{1 / student['packed_share']:.1f} of the "
            f"teacher's weights; {show_count(student['nonzero_params'], 'parameter')} not zero, "
            f"{show(student['packed_top1'], '{:.2f} %')} top-1"
        )
