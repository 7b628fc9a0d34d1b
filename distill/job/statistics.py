"""The statistics that first weights ask for: gathered once by rank 0, for all candidates, kept in the run directory."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from distill.data import Dataset
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.job.reuse import TEACHER
from distill.profiling.statistics import InputStatistics, gather
from distill.storage.files import write_bytes

STATISTICS = "statistics.safetensors"


def find_statistics(
    context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks
) -> dict[str, InputStatistics]:
    """Return what flows into the layers that recipes have asked for, by their paths, over the first batches of the
    training images; the same on every rank, and nothing where no recipe asks. Every rank must call."""
    wanted = sorted({path for one in blocks.candidates.values() for path in one.recipe.wants(one.changes)})
    if not wanted:
        return {}

    def work() -> dict[str, Any]:
        batches = context.config.student.statistics_batches
        layers = {path: teacher.get_submodule(path) for path in wanted}
        found = gather(layers, (dataset.train_batch(step).images for step in range(batches)), teacher.eval())
        write_bytes(context.run.path / STATISTICS, save(_tensors(found)))
        context.say(f"statistics: of the inputs of {len(wanted)} layers, over {batches} batches")
        return {"layers": wanted, "batches": batches}

    context.lead("statistics", work, made=[STATISTICS], used=[TEACHER])
    tensors = load(context.run.read(STATISTICS))
    return {
        path: InputStatistics(tensors[f"{path}/mean"], tensors[f"{path}/covariance"], int(tensors[f"{path}/rows"]))
        for path in wanted
    }


def _tensors(found: dict[str, InputStatistics]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path, one in found.items():
        tensors |= {f"{path}/mean": one.mean, f"{path}/covariance": one.covariance.contiguous()}
        tensors[f"{path}/rows"] = torch.tensor(one.rows)
    return tensors
