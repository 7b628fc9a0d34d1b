"""The teacher's one pass over the fixed views, shared among the ranks of a host, and the stream that reads it back.

An activation's last bits may depend on the batch that it was computed in. So images are recorded in the batches of
Dataset.fixed_batches(), whoever records them, and what students see is a function of the configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.blocks.chain import Chain
from distill.cache.places import Place
from distill.cache.rows import Cache, Layout, Rows, map_file
from distill.data import Dataset
from distill.distributed.edges.receiver import Delivery
from distill.distributed.store import Control
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


def record(
    make_place: Callable[[], Place],
    *,
    layout: Layout,
    contents: Contents,
    chain: Chain,
    device: torch.device,
    control: Control,
    peers: list[int],
    trace: Trace,
) -> Recorded:
    """Return the cache of this host, recorded now unless its place is complete. Called by all of the host's ranks,
    `peers`, of which the first makes the place; each records its share and waits for the others'."""
    leader = peers[0]
    place = make_place() if control.rank == leader else None
    if place is not None:
        place.check()
        if not place.complete:
            place.reserve(layout.nbytes)
        control.set(f"cache/place/{leader}", {"path": str(place.path), "complete": place.complete})
    found = control.wait(f"cache/place/{leader}", peer=leader, purpose="place of the cache")
    cache = Cache(map_file(Path(found["path"]), layout.nbytes), layout)
    passes = 0
    if not found["complete"]:
        with trace.span("record", "own share"):
            for first, images in contents.inputs(peers.index(control.rank), len(peers)):
                cache.write(first, chain.run(images, last=max(layout.forms), keep=layout.forms.keys()))
                passes += 1
    control.set(f"cache/share/{control.rank}", {"passes": passes})
    with trace.span("record", "wait for the other ranks"):
        for peer in peers:
            control.wait(f"cache/share/{peer}", peer=peer, purpose="share of the cache")
        if place is not None:
            if not place.complete:
                place.finish()
            control.set(f"cache/end/{leader}", True)
        control.wait(f"cache/end/{leader}", peer=leader, purpose="end of recording")
    return Recorded(cache, contents, device)
