"""Recorded activations by address, and the stream that reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.cache.rows import Cache, Rows
from distill.data import Dataset
from distill.distributed.edges.receiver import Delivery
from distill.observability.trace import Trace
from distill.planning.schedule import Address, Feed


@dataclass(frozen=True)
class Contents:
    """What a cache holds in which order: all fixed views of the training images, then `held_out` validation batches."""

    dataset: Dataset
    held_out: int

    @property
    def num_rows(self) -> int:
        return self._num_fixed + self.held_out * self._held_out_size

    @property
    def num_batches(self) -> int:
        """Teacher passes that it takes to record."""
        return self.dataset.num_fixed_batches + self.held_out

    def rows_at(self, address: Address) -> Rows:
        """Return the rows of the batch at an address."""
        if address.is_training:
            return self.dataset.fixed_places(address.step)
        first = self._num_fixed + address.check % self.held_out * self._held_out_size
        return slice(first, first + self._held_out_size)

    def inputs(self, part: int, num_parts: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the images of every num_parts-th batch to record, with their first row."""
        for first, batch in self.dataset.fixed_batches(part, num_parts):
            yield first, batch.images
        for check in range(self.held_out)[part::num_parts]:
            yield self._num_fixed + check * self._held_out_size, self.dataset.validation_batch(check).images

    @property
    def _num_fixed(self) -> int:
        return self.dataset.num_views * self.dataset.num_train

    @property
    def _held_out_size(self) -> int:
        return min(self.dataset.batch_size, self.dataset.num_validation)


@dataclass(frozen=True)
class Recorded:
    """A complete cache, by address."""

    cache: Cache
    contents: Contents
    device: torch.device

    def at(self, address: Address, boundaries: Collection[int]) -> dict[int, Tensor]:
        """Return some boundaries of the batch at an address."""
        return self.cache.read(self.contents.rows_at(address), boundaries, self.device)


class CachedStream:
    """Deliveries for this rank's blocks from what was recorded."""

    def __init__(self, *, recorded: Recorded, feed: Feed, trace: Trace) -> None:
        self._recorded, self._feed, self._trace = recorded, feed, trace

    def __iter__(self) -> Iterator[Delivery]:
        while (address := self._feed.cursor) is not None:
            with self._trace.span("teacher", "cache", address.step):
                boundaries = self._recorded.at(address, self._feed.boundaries_at(address))
            self._feed.advance()
            yield Delivery(address, boundaries)

    def finish(self, block: int) -> None:
        self._feed.finish(block)
