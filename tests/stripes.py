"""Images of stripes, lying or standing, in the files that docs/extending/data_set.md reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

COUNT = {"train": 160, "test": 64}


def write_stripes(folder: Path, side: int) -> Path:
    """Write both splits into a new folder; return it."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, count in COUNT.items():
        images = random.integers(0, 128, (count, side, side, 3), dtype=np.uint8)
        images[0::2, ::2] += 127
        images[1::2, :, ::2] += 127
        np.save(folder / f"{split}-images.npy", images)
        np.save(folder / f"{split}-labels.npy", np.arange(count) % 2)
    (folder / "classes.txt").write_text("lying standing\n")
    return folder
