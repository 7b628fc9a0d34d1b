"""The question that a batch puts to a split, and the two ways to answer it share: memory.py and stream.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


class View(Enum):
    """How a streamed image becomes square; images in memory are square already."""

    fit = "fit"  # as in memory, so that padded crops give the same bits either way
    evaluation = "evaluation"  # resize by 256/224, centre crop
    resized_crop = "resized_crop"  # a random box, resized


@dataclass(frozen=True)
class Request:
    """Rows of a split and their view. Arrays of numpy: tensors would cost each worker a shared-memory file a batch."""

    rows: npt.NDArray[np.int64]  # (B,)
    view: View
    uniforms: npt.NDArray[np.float32] | None = None  # (B, ATTEMPTS, 4), see augment.Draws
    draw: str = "evaluation"  # which of an item's own random numbers are meant: those of an epoch, a view, this


class Decoded(NamedTuple):
    """A decoded request; `bad` has the name and reason of every unusable image that was met on the way."""

    images: Tensor  # (B, H, W, 3), uint8 or, from 0 to 1, float32
    labels: Tensor  # (B,) int64
    bad: tuple[tuple[str, str], ...]


class Images(Protocol):
    """The pixels of one split at image_size x image_size."""

    @property
    def evaluation_side(self) -> int:
        """What the shorter side of an image is resized to for evaluation, in pixels, before the centre crop."""

    def readable(self, rows: Tensor) -> Tensor:
        """Return `rows` without those known not to be decodable."""

    def read(self, request: Request) -> tuple[Tensor, Tensor]:
        """Return images (B, H, W, 3), uint8 or from 0 to 1 float32, and int64 labels (B,), both on the device."""

    def read_many(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        """Return what `read` returns for each request, in order."""

    def close(self) -> None:
        """Free memory and end worker processes."""
