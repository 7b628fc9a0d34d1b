"""Opened data sets for tests: the settings that no test is about, in one place."""

from typing import Any

import torch

from distill.data import Augment, DataOptions, Dataset, open_dataset

AS_THEY_ARE: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}  # pixels from 0 to 1, not normalized


def opened(name: str = "digits", root: object = None, **changes: Any) -> Dataset:
    """Open a data set on the CPU without worker processes or downloads."""
    settings: dict[str, Any] = {
        "image_size": 16,
        "augment": Augment.crop_flip,
        "batch_size": 32,
        "validation_fraction": 0.1,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "num_workers": 0,
        "download": False,
    }
    seed, ranks_here = changes.pop("seed", 5), changes.pop("ranks_here", 1)
    options = DataOptions(name=name, root=None if root is None else str(root), **(settings | changes))
    return open_dataset(options, seed=seed, device=torch.device("cpu"), ranks_here=ranks_here)
