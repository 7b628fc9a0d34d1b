"""open_dataset() and the Dataset it returns: batches for training, validation and test, on the device."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.data.addressing import TrainOrder, derive_seed, split_rows
from distill.data.augment import Augment, Draws, crop_and_flip, draw, normalise
from distill.data.bad_images import SkippedImages
from distill.data.cifar import open_cifar
from distill.data.decoding import Squaring
from distill.data.digits import open_digits
from distill.data.folder import open_folder
from distill.data.huggingface import open_hub
from distill.data.in_memory import MemoryImages
from distill.data.items import ItemReader, Items, UnusableItems, classes_of, open_items
from distill.data.options import GIB, DataOptions
from distill.data.request import Images, Request, View
from distill.data.source import ImageSource, Splits
from distill.data.streamed import BatchDecoder, StreamImages
from distill.data.views import draw_view
from distill.errors import ConfigError, one_of
from distill.machine.host import available_memory, share_of_cores

NAMES = ("digits", "cifar10", "cifar100", "imagefolder", "hf", "custom")
MOST_CORES = 8  # for decoding: a rank has other work for the rest


@dataclass(frozen=True)
class Batch:
    """Normalised images (B, 3, H, W), float32, channels_last, and labels (B,), int64; both on the data's device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How pixels are read: what the training and the test split have in common."""

    squaring: Squaring
    augment: Augment
    memory_limit_bytes: float
    num_workers: int
    num_threads: int
    device: torch.device
    seed: int
    num_classes: int

    def open(self, source: ImageSource | Items, skipped: SkippedImages, held_out: Tensor | None) -> Images:
        """Return the pixels of a split: in memory where they fit, else streamed.

        `held_out` are the rows that must not stand in for undecodable ones of the rest; None: none may stand in.
        Raises ConfigError where they should be in memory by the configuration and there is too little of it.
        """
        if isinstance(source, Items):
            return self._stream_items(source)
        num_bytes = len(source) * self.squaring.image_size**2 * 3
        # In memory images have their final size already, and random resized crops are of those as they come.
        if num_bytes <= self.memory_limit_bytes and self.augment is not Augment.resized_crop_flip:
            if num_bytes > (spare := available_memory()):
                allowed = f"less than {num_bytes / GIB:.3g}, so that images are streamed: {spare / GIB:.3g} are free"
                raise ConfigError("data.memory_limit_gib", self.memory_limit_bytes / GIB, allowed)
            return MemoryImages(
                source,
                squaring=self.squaring,
                skipped=skipped,
                num_threads=self.num_threads,
                device=self.device,
            )
        groups = None
        if held_out is not None:
            groups = np.zeros(len(source), dtype=np.int8)
            groups[held_out.numpy()] = 1
        decoder = BatchDecoder(source, squaring=self.squaring, groups=groups, max_bad_images=skipped.limit)
        return StreamImages(
            decoder,
            bad=skipped,
            must_be_full=groups is not None,
            image_bytes=self.squaring.image_size**2 * 3,
            evaluation_side=self.squaring.evaluation_side,
            num_workers=self.num_workers,
            device=self.device,
        )

    def _stream_items(self, items: Items) -> Images:
        size = self.squaring.image_size
        reader = ItemReader(items, image_size=size, num_classes=self.num_classes, seed=self.seed)
        return StreamImages(
            reader,
            bad=UnusableItems(items.factory),
            must_be_full=True,
            image_bytes=reader.image_bytes,
            evaluation_side=size,
            num_workers=self.num_workers,
            device=self.device,
        )


class Dataset:
    """Batches addressed by step. Made by open_dataset; close() it, or use it in a `with` statement.

    Reading can raise ConfigError on data.max_bad_images, when images are streamed and too many cannot be decoded.
    num_test counts images as listed; those that cannot be decoded are missing from test_batches.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        reading: Reading,
        options: DataOptions,
    ) -> None:
        batch_size, seed, validation_fraction = options.batch_size, reading.seed, options.validation_fraction
        self._splits = splits
        self._reading = reading
        self._seed = seed
        self._varies = reading.augment is not Augment.none or isinstance(splits.train, Items)
        self._views: int | None = None if self._varies else 1
        self._skipped = SkippedImages(options.max_bad_images)
        self._mean_C11 = torch.tensor(options.mean, dtype=torch.float32, device=reading.device)[:, None, None]
        self._std_C11 = torch.tensor(options.std, dtype=torch.float32, device=reading.device)[:, None, None]
        if len(splits.train) < 2:
            raise ConfigError("data.root", len(splits.train), "at least 2 training images, one of them held out")
        train, validation = split_rows(len(splits.train), fraction=validation_fraction, seed=seed)
        self._images = reading.open(splits.train, self._skipped, held_out=validation)
        train, self._validation = self._images.readable(train), self._images.readable(validation)
        if not len(self._validation):
            raise ConfigError("data.validation_fraction", validation_fraction, "a share with at least 1 readable image")
        if batch_size > len(train):
            allowed = f"at most {len(train)}, the training images that are not held out for validation"
            raise ConfigError("data.batch_size", batch_size, allowed)
        self._order = TrainOrder(train, batch_size=batch_size, seed=seed)
        self.batch_size = batch_size
        self.classes = splits.classes
        self.image_shape = (3, reading.squaring.image_size, reading.squaring.image_size)
        self.num_train = len(train)
        self.num_validation = len(self._validation)
        self.num_validation_batches = max(1, self.num_validation // batch_size)
        self.steps_per_epoch = self._order.steps_per_epoch

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def num_test(self) -> int:
        """Images of the test split, as listed. Lists the split, but decodes nothing."""
        return len(self._test_source)

    @property
    def evaluation_side(self) -> int:
        """What the shorter side of a test image is resized to before the centre crop, in pixels."""
        return self._test_images.evaluation_side

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the images met so far that could not be decoded."""
        return self._skipped.names

    def with_views(self, views: int | None) -> Dataset:
        """Return this dataset with `views` fixed augmentations of every training image that its epochs take in turn, in
        place of fresh ones in every epoch; itself for None. It is closed with this one."""
        if views is None or not self._varies:
            return self
        fixed = copy.copy(self)
        fixed._views = views
        return fixed

    @property
    def num_views(self) -> int:
        """Fixed augmentations of every training image; 1 without any augmentation."""
        assert self._views is not None, "augmentation is fresh in every epoch"
        return self._views

    @property
    def num_fixed_batches(self) -> int:
        """Batches of fixed_batches(), over all parts."""
        return self.num_views * math.ceil(self.num_train / self.batch_size)

    def fixed_batches(self, part: int = 0, num_parts: int = 1) -> Iterator[tuple[int, Batch]]:
        """Return every view of every training image once over the parts, view after view in the set's own order: the
        place of a batch's first image in that order, and the batch. The last batch of a view may be smaller."""
        firsts = range(0, self.num_train, self.batch_size)
        batches = [(view, first) for view in range(self.num_views) for first in firsts][part::num_parts]

        def draws(view: int, first: int) -> Draws:
            return self._view_draws(self._order.all_rows[first : first + self.batch_size], view)

        requests = (
            self._request(self._order.all_rows[first : first + self.batch_size], draws(view, first), f"view {view}")
            for view, first in batches
        )
        for (view, first), (images_BHWC, labels) in zip(batches, self._images.read_many(requests), strict=True):
            augmented = crop_and_flip(images_BHWC, draws(view, first), self._reading.augment)
            yield view * self.num_train + first, self._batch(augmented, labels)

    def fixed_places(self, step: int) -> Tensor:
        """Return where the images of the training batch `step` stand in the order of fixed_batches(), int64 (B,)."""
        view = step // self.steps_per_epoch % self.num_views
        return view * self.num_train + self._order.places(step)

    def train_batch(self, step: int, part: int = 0, num_parts: int = 1) -> Batch:
        """Return rows part::num_parts of the training batch `step`, decoding only those."""
        draws = self._draws(step, part, num_parts)
        images_BHWC, labels = self._images.read(self._train_request(step, part, num_parts, draws))
        return self._batch(crop_and_flip(images_BHWC, draws, self._reading.augment), labels)

    def train_batches(
        self, start: int, stop: int, part: int = 0, num_parts: int = 1, *, every: int = 1
    ) -> Generator[Batch, None, None]:
        """Return what train_batch returns for the steps range(start, stop, every), decoded ahead where streamed."""
        steps = range(start, stop, every)
        requests = (self._train_request(step, part, num_parts, self._draws(step, part, num_parts)) for step in steps)
        for step, (images_BHWC, labels) in zip(steps, self._images.read_many(requests), strict=True):
            draws = self._draws(step, part, num_parts)
            yield self._batch(crop_and_flip(images_BHWC, draws, self._reading.augment), labels)

    def redrawn(self, step: int, number: int, part: int = 0, num_parts: int = 1) -> Batch:
        """Return the images of train_batch(step, part, num_parts) in another augmentation, the `number`-th (from 1):
        fresh numbers where its own are, the `number`-th view behind its own where views are fixed."""
        rows, epoch = self._order.rows(step)[part::num_parts], step // self.steps_per_epoch
        size = self._reading.squaring.image_size
        if self._views is None:
            seed = derive_seed(self._seed, "redrawn", number)
            draws = draw(batch_size=self.batch_size, image_size=size, seed=seed, step=step).part(part, num_parts)
            name = f"epoch {epoch}, redrawn {number}"
        else:
            view = (epoch + number) % self._views
            draws, name = self._view_draws(rows, view), f"view {view}"
        images_BHWC, labels = self._images.read(self._request(rows, draws, name))
        return self._batch(crop_and_flip(images_BHWC, draws, self._reading.augment), labels)

    def measure_start(self) -> float:
        """Return the seconds from train_batches() to its first batch, for which processes start that decode streamed
        images; 0 where images are in memory."""
        if isinstance(self._images, MemoryImages):
            return 0.0
        began = time.perf_counter()
        with contextlib.closing(self.train_batches(0, self.steps_per_epoch)) as batches:
            next(batches)
            return time.perf_counter() - began

    def validation_batch(self, index: int) -> Batch:
        """Return full validation batch `index` modulo num_validation_batches; all images, where they are too few."""
        first = index % self.num_validation_batches * self.batch_size
        return self._batch(*self._images.read(_evaluation(self._validation[first : first + self.batch_size])))

    def validation_batches(self, batch_size: int, part: int = 0, num_parts: int = 1) -> Iterator[Batch]:
        """Return every validation image once over the parts, never augmented; the last batch may be smaller. Batches do
        not depend on the number of parts, and hence what a network makes of them neither."""
        requests = map(_evaluation, _cut(self._validation, batch_size)[part::num_parts])
        for images_BHWC, labels in self._images.read_many(requests):
            yield self._batch(images_BHWC, labels)

    def test_batches(self, batch_size: int, part: int = 0, num_parts: int = 1) -> Iterator[Batch]:
        """Return every readable test image once over the parts, never augmented; batches may be smaller."""
        assert 0 <= part < num_parts, (part, num_parts)
        rows = self._test_images.readable(torch.arange(self.num_test))[part::num_parts]
        for images_BHWC, labels in self._test_images.read_many(map(_evaluation, _cut(rows, batch_size))):
            if len(labels):
                yield self._batch(images_BHWC, labels)

    def close(self) -> None:
        """Free the images and end the worker processes; iterators under way fail. The dataset is of no use after."""
        self._images.close()
        if "_test_images" in self.__dict__:
            self._test_images.close()

    @functools.cached_property
    def _test_source(self) -> ImageSource | Items:
        source = self._splits.open_test()
        if not len(source):
            raise ConfigError("data.root", 0, "at least 1 test image")
        return source

    @functools.cached_property
    def _test_images(self) -> Images:
        return self._reading.open(self._test_source, self._skipped, held_out=None)

    def _draws(self, step: int, part: int, num_parts: int) -> Draws:
        assert 0 <= part < num_parts, (part, num_parts)
        if self._views is not None:
            return self._view_draws(self._order.rows(step)[part::num_parts], step // self.steps_per_epoch % self._views)
        size = self._reading.squaring.image_size
        return draw(batch_size=self.batch_size, image_size=size, seed=self._seed, step=step).part(part, num_parts)

    def _view_draws(self, rows: Tensor, view: int) -> Draws:
        return draw_view(rows, view=view, image_size=self._reading.squaring.image_size, seed=self._seed)

    def _train_request(self, step: int, part: int, num_parts: int, draws: Draws) -> Request:
        epoch = step // self.steps_per_epoch
        draw = f"epoch {epoch}" if self._views is None else f"view {epoch % self._views}"
        return self._request(self._order.rows(step)[part::num_parts], draws, draw)

    def _request(self, rows: Tensor, draws: Draws, draw: str) -> Request:
        if self._reading.augment is Augment.resized_crop_flip:
            return Request(rows.numpy(), View.resized_crop, draws.uniforms.numpy(), draw)
        return Request(rows.numpy(), View.fit, draw=draw)

    def _batch(self, images_BHWC: Tensor, labels: Tensor) -> Batch:
        return Batch(normalise(images_BHWC, mean_C11=self._mean_C11, std_C11=self._std_C11), labels)


def _cut(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _evaluation(rows: Tensor) -> Request:
    return Request(rows.numpy(), View.evaluation)


def open_dataset(options: DataOptions, *, seed: int, device: torch.device, ranks_here: int = 1) -> Dataset:
    """Return the data set, its training images ready to be read; `ranks_here` share the host's cores.

    A split within memory_limit_gib (count * image_size^2 * 3 bytes) is decoded now and kept, on the device; a larger
    one, and any with resized_crop_flip, is decoded batch by batch in num_workers processes. In memory, an image that is
    not image_size x image_size has its shorter side resized to that and is centre cropped; streamed validation and test
    images are resized to 256/224 of it first, as ImageNet networks expect. `resize` replaces both sizes, crop_mode
    squash resizes both sides. Items of a set from outside are as that gives them (see items.py).
    Raises ConfigError on the setting of data.* that cannot be honoured.
    """
    cores = min(MOST_CORES, share_of_cores(ranks_here))
    splits = _open_splits(options)
    reading = Reading(
        squaring=Squaring(
            options.image_size, options.resize, options.interpolation, squash=options.crop_mode == "squash"
        ),
        augment=options.augment,
        memory_limit_bytes=options.memory_limit_bytes,
        num_workers=cores if options.num_workers is None else options.num_workers,
        num_threads=cores,
        device=device,
        seed=seed,
        num_classes=len(splits.classes),
    )
    return Dataset(splits, reading=reading, options=options)


def _open_splits(options: DataOptions) -> Splits:
    name, root, upright = options.name, options.root, options.exif_orientation
    splits = {"train_split": options.train_split, "test_split": options.test_split}
    if name == "digits":
        return open_digits()
    if name in ("cifar10", "cifar100"):
        return open_cifar(name=name, root=root, download=options.download)
    if name == "imagefolder":
        return open_folder(root=root, upright=upright, **splits)
    if name == "hf":
        return open_hub(
            root=root,
            image_column=options.image_column,
            label_column=options.label_column,
            memory_limit_bytes=options.memory_limit_bytes,
            download=options.download,
            upright=upright,
            **splits,
        )
    if name == "custom":
        factory = options.factory or ""
        train = open_items(factory, options.options, train=True)
        open_test = functools.partial(open_items, factory, options.options, train=False)
        return Splits(train=train, open_test=open_test, classes=classes_of(train))
    raise ConfigError("data.name", name, one_of(NAMES, name))
