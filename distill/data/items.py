"""Data sets of the user's own: data=custom data.factory=package.module:function, with data.options.NAME=VALUE.

The function is called as function(train=True, **options) and function(train=False, **options), and returns a map-style
data set: len(), and by index an image and its label.

    def photographs(train: bool, root: str) -> Dataset:
        return torchvision.datasets.Flowers102(root, split="train" if train else "test", transform=to_tensor_of_32)

* An image is a tensor (3, S, S), or (1, S, S) for gray, with S = data.image_size: uint8, or floating point with pixels
  from 0 to 1. Both are normalised by data.mean and data.std; one that its transform has normalised already goes with
  data.mean=[0,0,0] data.std=[1,1,1]. All items are of one of the two kinds.
* A label is a whole number from 0 on. The attribute `classes` has their names; without it all items are read to count.
* Random numbers of torch, NumPy and random that an item draws are seeded by (seed, epoch, index), so that a batch is
  the same wherever and whenever it is read; those that the function draws are always the same. Validation images are
  items of the training set, under seeds of their own.
* What it is counts in a run's identity: the function's source and options, and of each set the length, and the
  attribute `fingerprint` or else the content of some items.

Items are always read when they are needed, in data.num_workers processes (0: in the rank's own).
"""

from __future__ import annotations

import hashlib
import logging
import operator
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.addressing import derive_seed
from distill.data.request import Decoded, Request
from distill.errors import ConfigError
from distill.extensions import called, named, reason

SETTING = "data.factory"
DESCRIBED = 64  # items of a set whose content tells it apart
MOST = 100.0  # larger values are no pixels from 0 to 1, also after a usual normalisation

log = logging.getLogger(__name__)


class UnusableItemError(Exception):
    """An item that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class Items:
    """One split of a data set from outside; picklable where the set is."""

    dataset: Any
    factory: str
    split: str

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, row: int) -> str:
        """What a person finds an item by."""
        return f"{self.split} item {row}"

    def read(self, row: int, *, seed: int) -> tuple[Tensor, int]:
        """Return an image, uint8 or float32 (C, H, W), and its label, under this seed; raise UnusableItemError."""
        _seed_all(seed)
        try:
            image, label = self.dataset[row]
        except Exception as error:  # whatever stands in the user's class
            raise UnusableItemError(f"not an image and a label: {reason(error)}") from error
        if not isinstance(image, Tensor) or image.dim() != 3 or not (image.is_floating_point() or _is_bytes(image)):
            got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else str(type(image))
            raise UnusableItemError(f"an image is a tensor (channels, height, width), uint8 or float, not {got}")
        try:
            return image if _is_bytes(image) else image.float(), operator.index(label)
        except TypeError as error:
            raise UnusableItemError(f"a label is a whole number, not {label!r}") from error


def _is_bytes(image: Tensor) -> bool:
    return image.dtype == torch.uint8


def open_items(factory: str, options: Mapping[str, object], *, train: bool) -> Items:
    """Return a split of the data set that data.factory names. Raises ConfigError on data.factory or data.options."""
    build: Any = named(SETTING, factory, {}, "distill.data")
    if not callable(build):
        raise ConfigError(SETTING, factory, f"a function, not {type(build)}")
    with _random_state_kept():
        _seed_all(0)  # a set that is made up is the same on every rank, and in the next attempt
        try:
            dataset: Any = called("data.options", build, options=options, train=train)
            length = len(dataset)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(SETTING, factory, f"a function that returns a data set ({reason(error)})") from error
    if length == 0 or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            SETTING, factory, f"a data set with items by index; with train={train} it has length {length}"
        )
    return Items(dataset, factory, "training" if train else "test")


def classes_of(items: Items) -> tuple[str, ...]:
    """Return the names of a training set's classes, or numbers as far as its labels go."""
    names = getattr(items.dataset, "classes", None)
    if names is not None:
        return tuple(map(str, names))
    log.info("data: reading all %d items to count classes: %s has no attribute classes", len(items), items.factory)
    with _random_state_kept():
        try:
            labels = [items.read(row, seed=0)[1] for row in range(len(items))]
        except UnusableItemError as error:
            raise ConfigError(SETTING, items.factory, f"items of an image and a label ({error})") from error
    return tuple(map(str, range(max(labels) + 1)))


def describe(factory: str, options: Mapping[str, object], *, train: bool) -> str:
    """Return what tells a split from others, in words."""
    items = open_items(factory, options, train=train)
    own = getattr(items.dataset, "fingerprint", None)
    if own is not None:
        return f"{len(items)} items, fingerprint {own}"
    digest = hashlib.sha256()
    with _random_state_kept():
        for row in np.linspace(0, len(items) - 1, min(len(items), DESCRIBED), dtype=int).tolist():
            try:
                image, label = items.read(row, seed=derive_seed(0, "described", row))
            except UnusableItemError as error:
                raise ConfigError(SETTING, factory, f"items that can be used; {items.name(row)}: {error}") from error
            digest.update(f"{image.dtype} {tuple(image.shape)} {label}\n".encode() + image.numpy().tobytes())
    return f"{len(items)} items, content {digest.hexdigest()[:16]}"


class ItemReader:
    """Item `request` is a whole batch, as for decoding.BatchDecoder; the first item that cannot be used ends it."""

    def __init__(self, items: Items, *, image_size: int, num_classes: int, seed: int) -> None:
        self._items, self._size, self._num_classes, self._seed = items, image_size, num_classes, seed
        with _random_state_kept():
            try:
                self._dtype = items.read(0, seed=0)[0].dtype
            except UnusableItemError:
                self._dtype = torch.uint8  # reading will say what is wrong

    @property
    def image_bytes(self) -> int:
        """Bytes of one image as it is read."""
        return self._size**2 * 3 * self._dtype.itemsize

    def __getitem__(self, request: Request) -> Decoded:
        images, labels = [torch.empty(0, self._size, self._size, 3, dtype=self._dtype)], list[int]()
        with _random_state_kept():
            for row in request.rows.tolist():
                try:
                    image, label = self._read(row, request.draw)
                except UnusableItemError as error:
                    return Decoded(images[0], torch.empty(0, dtype=torch.int64), ((self._items.name(row), str(error)),))
                images.append(image.permute(1, 2, 0).expand(1, -1, -1, 3))
                labels.append(label)
        return Decoded(torch.cat(images), torch.tensor(labels, dtype=torch.int64), ())

    def _read(self, row: int, draw: str) -> tuple[Tensor, int]:
        image, label = self._items.read(row, seed=derive_seed(self._seed, "item", draw, row))
        if image.shape[0] not in (1, 3) or image.shape[1:] != (self._size, self._size):
            side = self._size
            wanted = f"(3, {side}, {side}) or (1, {side}, {side}): data.image_size={side}"
            raise UnusableItemError(f"an image has the shape {wanted}, not {tuple(image.shape)}")
        if image.dtype != self._dtype:
            raise UnusableItemError(f"all images are of one kind; this one is {image.dtype}, the first {self._dtype}")
        if image.is_floating_point() and not image.abs().max() <= MOST:
            raise UnusableItemError(f"pixels in floating point go from 0 to 1, not to {image.abs().max():g}")
        if not 0 <= label < self._num_classes:
            raise UnusableItemError(f"labels go from 0 to {self._num_classes - 1}, not to {label}")
        return image, label


@dataclass(frozen=True)
class UnusableItems:
    """Ends the job at an item that cannot be used, in the place of SkippedImages."""

    factory: str

    def add(self, name: str, why: str) -> None:
        raise ConfigError(SETTING, self.factory, f"items that can be used; {name}: {why}")


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed(): CUDA devices are no business of a data set's


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the process's random numbers as they were."""
    own, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)
