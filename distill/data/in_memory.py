"""A split that lives in memory: decoded once, a uint8 tensor on the device. Knows nothing of steps or seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from distill.data.bad_images import SkippedImages
from distill.data.decoding import Squaring, UnreadableImageError, fit, pixels
from distill.data.request import Request
from distill.data.source import ImageSource

T = TypeVar("T")
# PIL lets go of the interpreter while it decodes, but for small images that costs more than it gains: two threads took
# 1.5 times as long as one for 32 x 32 PNGs (0.2 ms each).
THREADS_PAY_S = 0.5e-3
ROWS_PER_TASK = 256  # small enough to stop soon after one bad image too many


class MemoryImages:
    """All images of a source at image_size x image_size, uint8, resident on the device.

    An image that has the size already is kept as it is; any other has its shorter side resized and is centre
    cropped, as `squaring` says, for training and evaluation alike. Undecodable images are never returned: `readable`
    drops them.
    Raises ConfigError on data.max_bad_images when there are too many.
    """

    def __init__(
        self, source: ImageSource, *, squaring: Squaring, skipped: SkippedImages, num_threads: int, device: torch.device
    ) -> None:
        images_NHWC, self._is_bad = _load(source, squaring, skipped, num_threads)
        self._images_NHWC = images_NHWC.to(device)
        self._labels = source.labels.to(device)
        self.evaluation_side = squaring.fit_side

    def readable(self, rows: Tensor) -> Tensor:
        return rows[~self._is_bad[rows]]

    def read(self, request: Request) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(request.rows).to(self._labels.device)
        return self._images_NHWC[rows], self._labels[rows]

    def read_many(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.read, requests)

    def close(self) -> None:
        self._images_NHWC = self._images_NHWC.new_empty(0)


def _load(source: ImageSource, squaring: Squaring, skipped: SkippedImages, num_threads: int) -> tuple[Tensor, Tensor]:
    """Return the images (N, S, S, 3), black where undecodable, and which ones those are, bool (N,)."""
    count, side = len(source), squaring.image_size
    images_NHWC = np.zeros((count, side, side, 3), dtype=np.uint8)
    is_bad = torch.zeros(count, dtype=torch.bool)

    def load_rows(start: int) -> list[tuple[int, str]]:
        bad = []
        for row in range(start, min(start + ROWS_PER_TASK, count)):
            try:
                images_NHWC[row] = pixels(fit(source.open(row), squaring))
            except UnreadableImageError as error:
                bad.append((row, str(error)))
        return bad

    with closing(
        _map(load_rows, range(0, count, ROWS_PER_TASK), num_threads)
    ) as tasks:  # one bad image too many stops the rest
        for bad in tasks:
            for row, reason in bad:
                is_bad[row] = True
                skipped.add(source.name(row), reason)
    return torch.from_numpy(images_NHWC), is_bad


def _map(load_rows: Callable[[int], T], starts: Sequence[int], num_threads: int) -> Generator[T, None, None]:
    """Return load_rows of each start, in order; on several threads where the first shows that they pay."""
    began = time.perf_counter()
    yield load_rows(starts[0])
    if time.perf_counter() - began < ROWS_PER_TASK * THREADS_PAY_S:
        yield from map(load_rows, starts[1:])
        return
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from pool.map(load_rows, starts[1:])
    finally:
        pool.shutdown(cancel_futures=True)
