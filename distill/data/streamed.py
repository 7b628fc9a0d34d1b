"""A split that is decoded batch by batch, here or in worker processes. Knows nothing of steps or seeds."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pickle import PicklingError
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from distill.data import decoding
from distill.data.augment import resized_crop_box
from distill.data.decoding import Squaring, UnreadableImageError
from distill.data.request import Decoded, Request, View
from distill.data.source import ImageSource
from distill.errors import ConfigError
from distill.machine.host import shared_memory_left

log = logging.getLogger(__name__)

T = TypeVar("T")
PREFETCHED = 2  # batches that a worker is ahead by
WORKER_TIMEOUT_S = 600  # a worker that gives no batch in this time is presumed stuck; the loader then raises


class BatchDecoder:
    """Item `request` is a whole batch; a map-style dataset to DataLoader, which runs it in its workers.

    An undecodable image is replaced by the next readable row of its group, so that a batch stays a pure function of
    its request and no validation image is ever trained on. Without groups (the test split) it is left out.
    """

    def __init__(
        self, source: ImageSource, *, squaring: Squaring, groups: npt.NDArray[np.int8] | None, max_bad_images: int
    ) -> None:
        self._source = source
        self._squaring = squaring
        self._groups = groups
        self._max_bad_images = max_bad_images

    def __getitem__(self, request: Request) -> Decoded:
        images: list[npt.NDArray[np.uint8]] = []
        rows: list[int] = []
        bad: dict[str, str] = {}
        for position, row in enumerate(request.rows.tolist()):
            for candidate in self._candidates(row):
                try:
                    image = self._source.open(candidate)
                except UnreadableImageError as error:
                    bad[self._source.name(candidate)] = str(error)
                    if len(bad) > self._max_bad_images:
                        return self._decoded(images, rows, bad)  # the main process will raise
                    continue
                images.append(decoding.pixels(self._square(image, request, position)))
                rows.append(candidate)
                break
        return self._decoded(images, rows, bad)

    def _candidates(self, row: int) -> Iterator[int]:
        yield row
        if self._groups is not None:
            count = len(self._groups)
            for distance in range(1, count):
                candidate = (row + distance) % count
                if self._groups[candidate] == self._groups[row]:
                    yield candidate

    def _square(self, image: Image.Image, request: Request, position: int) -> Image.Image:
        if request.view is View.fit:
            return decoding.fit(image, self._squaring)
        if request.view is View.evaluation:
            return decoding.evaluation_view(image, self._squaring)
        assert request.uniforms is not None
        uniforms = torch.from_numpy(request.uniforms[position])
        box = resized_crop_box(uniforms, height=image.height, width=image.width)
        return decoding.crop_view(image, self._squaring, box)

    def _decoded(self, images: list[npt.NDArray[np.uint8]], rows: list[int], bad: dict[str, str]) -> Decoded:
        size = self._squaring.image_size
        images_BHWC = np.stack(images) if images else np.empty((0, size, size, 3), dtype=np.uint8)
        return Decoded(
            torch.from_numpy(images_BHWC),
            self._source.labels[torch.tensor(rows, dtype=torch.int64)],
            tuple(bad.items()),
        )


class Decoder(Protocol):
    """What answers requests, here or, sent there, in a worker process."""

    def __getitem__(self, request: Request) -> Decoded: ...


class Bad(Protocol):
    """What is done about images that cannot be used."""

    def add(self, name: str, reason: str) -> None:
        """Note one; raise ConfigError where it is one too many."""


class StreamImages:
    """Images that a decoder makes whenever they are read, ahead of time in `num_workers` processes.

    `must_be_full`: others stand in for images that cannot be decoded; else they are left out of the answer.
    Reading raises ConfigError, on data.max_bad_images once too many images were met that cannot be decoded.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        bad: Bad,
        must_be_full: bool,
        image_bytes: int,
        evaluation_side: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self._decoder, self._bad, self._must_be_full = decoder, bad, must_be_full
        self._image_bytes, self.evaluation_side = image_bytes, evaluation_side
        self._num_workers = num_workers
        self._device = device
        if num_workers:
            _worker_context()
            forkserver.ensure_running()  # in the background, so that it is ready when images are read
        self._running: weakref.WeakSet[Generator[tuple[Tensor, Tensor], None, None]] = weakref.WeakSet()

    def readable(self, rows: Tensor) -> Tensor:
        return rows

    def read(self, request: Request) -> tuple[Tensor, Tensor]:
        return self._accept(self._decoder[request], len(request.rows))

    def read_many(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        coming = iter(requests)
        # The first is looked at before any worker starts: its rows tell how much room batches take.
        first = next(coming, None)
        if first is None:
            return iter(())
        num_workers = self._workers_with_room(len(first.rows))
        if num_workers == 0:
            return map(self.read, itertools.chain([first], coming))
        batches = self._read_in_workers(itertools.chain([first], coming), num_workers)
        self._running.add(batches)
        return batches

    def close(self) -> None:
        for batches in list(self._running):
            batches.close()

    def _workers_with_room(self, batch_size: int) -> int:
        """Return how many workers may start: their batches wait in shared memory, and writing beyond it kills them."""
        left, room = shared_memory_left(), batch_size * self._image_bytes * (PREFETCHED + 1)
        fitting = min(self._num_workers, left // room)
        if fitting < self._num_workers:
            log.warning(
                "%d of %d processes decode images: there are %.0f MB of shared memory for batches, and each takes %.0f "
                "MB; docker gives a container more with --shm-size",
                fitting, self._num_workers, left / 1e6, room / 1e6,
            )  # fmt: skip
        return fitting

    def _read_in_workers(
        self, requests: Iterable[Request], num_workers: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        sizes: list[int] = []  # of the requests under way, oldest first

        def noted() -> Iterator[Request]:
            for request in requests:
                sizes.append(len(request.rows))
                yield request

        loader: DataLoader[Any] = DataLoader(
            self._decoder,  # type: ignore[arg-type]  # its index is a Request, not a number
            batch_size=None,
            sampler=noted(),
            num_workers=num_workers,
            prefetch_factor=PREFETCHED,
            collate_fn=_unchanged,
            pin_memory=self._device.type == "cuda",
            timeout=WORKER_TIMEOUT_S,
            multiprocessing_context=_worker_context(),
            generator=torch.Generator(),  # else the loader takes a number from the global generator
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Got pickle error")  # the loader's, before it raises
                batches = iter(loader)
        except (PicklingError, AttributeError, TypeError) as error:  # as pickle says it, of a set from outside
            allowed = f"0, which reads in the rank's own process: the data set cannot be sent to others ({error})"
            raise ConfigError("data.num_workers", num_workers, allowed) from error
        for decoded in batches:
            # The loader gives batches in the order of their requests, whichever worker is done first.
            yield self._accept(decoded, sizes.pop(0))

    def _accept(self, decoded: Decoded, num_rows: int) -> tuple[Tensor, Tensor]:
        for name, reason in decoded.bad:
            self._bad.add(name, reason)
        if self._must_be_full and len(decoded.labels) < num_rows:
            raise ConfigError("data.root", decoded.bad[0][0], "at least one image in each split that can be decoded")
        images_BHWC = decoded.images.to(self._device, non_blocking=True)
        return images_BHWC, decoded.labels.to(self._device, non_blocking=True)


def _worker_context() -> BaseContext:
    """Return how workers start: a plain fork of a process with threads or CUDA may hang, a server that is clean cannot.

    The server imports this module, and torch with it, once; without that each worker would, for seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _unchanged(decoded: T) -> T:
    return decoded
