"""Opened data sets for tests: the settings that no test is about, in one place."""

from typing import Any

import torch

from distill.data import Augment, Dataset, open_dataset

AS_THEY_ARE: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}  # pixels from 0 to 1, not normalized


def opened(name: str = "digits", root: object = None, **changes: Any) -> Dataset:
    """Open a data set on the CPU without worker processes or downloads."""
    settings: dict[str, Any] = {
        "image_size": 16,
        "augment": Augment.crop_flip,
        "batch_size": 32,
        "seed": 5,
        "validation_fraction": 0.1,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "device": torch.device("cpu"),
        "num_workers": 0,
        "download": False,
    }
    return open_dataset(name=name, root=None if root is None else str(root), **(settings | changes))
