"""Where images come from: what every kind of data must offer. Knows no batches, no seeds, no devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from distill.data.items import Items


class ImageSource(Protocol):
    """The images of one split by row; picklable, so that worker processes can have it."""

    labels: Tensor  # int64 (N,), on the CPU

    def __len__(self) -> int:
        """Images as listed, before any of them was decoded."""

    def name(self, row: int) -> str:
        """What a person finds the image by."""

    def open(self, row: int) -> Image.Image:
        """Return the image as RGB, of any size; raise UnreadableImageError."""


@dataclass(frozen=True)
class Splits:
    """A set of images: its training split, its test split (opened when it is asked for), its classes."""

    train: ImageSource | Items
    open_test: Callable[[], ImageSource | Items]
    classes: tuple[str, ...]


class ArraySource:
    """Images that are in memory as uint8 (N, H, W, 3), with int64 labels (N,)."""

    def __init__(self, images_NHWC: Tensor, labels: Tensor, *, title: str) -> None:
        assert images_NHWC.dtype == torch.uint8, images_NHWC.dtype
        assert images_NHWC.shape[0] == labels.shape[0], (images_NHWC.shape, labels.shape)
        self._images_NHWC = images_NHWC
        self._title = title
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        return f"{self._title}[{row}]"

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self._images_NHWC[row].numpy())


def readable(name: str) -> str:
    r"""Return a file's name as text for people and documents: bytes that are not UTF-8 become \xe9 and the like."""
    return os.fsencode(name).decode(errors="backslashreplace")
