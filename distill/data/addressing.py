"""Which images batch t holds: index arithmetic and seeds, a pure function of (seed, t). Knows no images, no devices."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

HELD_OUT = 5  # a set without a test split gives up one image in five


def derive_seed(seed: int, *words: object) -> int:
    """Return the seed in 0 .. 2^63 - 1 that belongs to `words` (by their str) under `seed`.

    The first 8 bytes of SHA-256 over the JSON list of strings, big-endian, less the lowest bit. The same on every
    machine, process and Python version, and unrelated for different words: ("a", "bc") is not ("ab", "c").
    """
    text = json.dumps([str(seed), *map(str, words)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *words: object) -> torch.Generator:
    """Return a new CPU generator that starts at derive_seed(seed, *words)."""
    return torch.Generator().manual_seed(derive_seed(seed, *words))


def split_rows(count: int, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the (training, validation) rows of 0 .. count - 1, int64; a permutation of `seed` decides.

    Validation gets round(count * fraction) rows, at least 1, and leaves at least 1 to training. Needs count >= 2.
    Training rows ascend (each epoch shuffles them); validation rows stay shuffled, so that a few batches of a set
    sorted by class still show many classes.
    """
    assert count >= 2, count
    num_validation = min(max(1, round(count * fraction)), count - 1)
    order = torch.randperm(count, generator=generator(seed, "validation"))
    return order[num_validation:].sort().values, order[:num_validation]


def fixed_fifth(count: int) -> tuple[Tensor, Tensor]:
    """Return the (training, test) rows of a set without a test split, both ascending int64; the same for every seed."""
    order = torch.randperm(count, generator=generator(0, "test"))
    num_test = max(1, count // HELD_OUT)
    return order[num_test:].sort().values, order[:num_test].sort().values


class TrainOrder:
    """The training rows of every step: epoch after epoch, each in its own order, the last partial batch dropped."""

    def __init__(self, rows: Tensor, *, batch_size: int, seed: int) -> None:
        assert 1 <= batch_size <= len(rows), (batch_size, len(rows))
        self.all_rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1  # the epoch that _order belongs to: a cache, never a state that changes an answer
        self._order = rows
        self.steps_per_epoch = len(rows) // batch_size

    def rows(self, step: int) -> Tensor:
        """Return the (batch_size,) int64 rows of the global batch `step`."""
        return self.all_rows[self.places(step)]

    def places(self, step: int) -> Tensor:
        """Return where in all_rows the rows of the global batch `step` stand, int64 (batch_size,)."""
        assert step >= 0, step
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(len(self.all_rows), generator=generator(self._seed, "epoch", epoch))
            self._epoch, self._order = epoch, order
        return self._order[position * self._batch_size : (position + 1) * self._batch_size]
