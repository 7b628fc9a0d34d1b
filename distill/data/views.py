"""The augmentation of an image's fixed views: random numbers that are a pure function of (seed, view, row)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distill.data.addressing import derive_seed
from distill.data.augment import ATTEMPTS, Draws, padding

NUMBERS = 3 + 4 * ATTEMPTS  # an image's: flip, top, left, and those of the attempts at a resized crop
GAMMA = 0x9E3779B97F4A7C15


def draw_view(rows: Tensor, *, view: int, image_size: int, seed: int) -> Draws:
    """Return the random numbers of view `view` of the images `rows` (B,), whatever batch they are in."""
    numbers = _uniform(rows.numpy(), derive_seed(seed, "view", view))
    positions = 2 * padding(image_size) + 1
    return Draws(
        torch.from_numpy(numbers[:, 0] < 0.5),
        torch.from_numpy((numbers[:, 1:3] * positions).astype(np.int64)),
        torch.from_numpy(numbers[:, 3:].reshape(len(rows), ATTEMPTS, 4)),
    )


def _uniform(rows: npt.NDArray[np.int64], key: int) -> npt.NDArray[np.float32]:
    """Return (B, NUMBERS) float32 in [0, 1), multiples of 2^-24: outputs number row * NUMBERS + column of a SplitMix64
    that starts at `key`.

    Source: Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 17.
    """
    index = rows.astype(np.uint64)[:, None] * np.uint64(NUMBERS) + np.arange(NUMBERS, dtype=np.uint64)
    z: npt.NDArray[np.uint64] = np.multiply(index + np.uint64(1), np.uint64(GAMMA), dtype=np.uint64)  # wraps around
    z += np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) >> np.uint64(40)
    return z.astype(np.float32) * np.float32(2**-24)
