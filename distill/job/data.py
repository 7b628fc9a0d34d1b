"""The images of a job, as the configuration names them."""

from __future__ import annotations

import torch

from distill.config.plain import options_of
from distill.config.schema import JobConfig
from distill.data import Augment, DataOptions, Dataset, open_dataset


def open_data(config: JobConfig, device: torch.device, *, ranks_here: int) -> Dataset:
    """Open the configured images, for one of `ranks_here` ranks on this host; nothing is written."""
    options = options_of(
        DataOptions,
        config.data,
        image_size=config.data.side,
        augment=Augment[config.data.augment.name],
        mean=config.mean,
        std=config.std,
    )
    return open_dataset(options, seed=config.seed, device=device, ranks_here=ranks_here)
