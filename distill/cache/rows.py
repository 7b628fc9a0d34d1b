"""Recorded activations: a row an image and boundary, in memory that is shared or backed by a file. Knows no ranks, no
teacher and no batches.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distill.blocks.chain import Boundary

Rows = Tensor | slice  # int64 (B,), or rows that follow one another
SAMPLE_BYTES = 128 * 2**20  # of the rows that prices are measured on: more than processors' caches hold


@dataclass(frozen=True)
class Layout:
    """What is recorded: boundaries in their forms, `num_rows` of each, in a precision; and where each row lies."""

    forms: Mapping[int, Boundary]
    dtype: torch.dtype
    num_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's row of every boundary."""
        return sum(map(self._row_bytes, self.forms))

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return self._edges()[-1]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield every boundary with the byte at which its rows begin."""
        return zip(sorted(self.forms), self._edges(), strict=False)

    def row_numel(self, boundary: int) -> int:
        return math.prod(self.forms[boundary].shape[1:])

    def _row_bytes(self, boundary: int) -> int:
        return self.row_numel(boundary) * self.dtype.itemsize

    def _edges(self) -> list[int]:
        edges = [0]
        for boundary in sorted(self.forms):
            pages = math.ceil(self.num_rows * self._row_bytes(boundary) / mmap.PAGESIZE)
            edges.append(edges[-1] + pages * mmap.PAGESIZE)
        return edges


def map_file(path: Path, nbytes: int) -> mmap.mmap:
    """Return the file's bytes as memory that all who map it share."""
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), nbytes)


class Cache:
    """The rows of a layout in a piece of memory, which several processes may have mapped."""

    def __init__(self, memory: mmap.mmap, layout: Layout) -> None:
        assert len(memory) == layout.nbytes, (len(memory), layout.nbytes)
        self.layout = layout
        self._rows = {
            boundary: torch.frombuffer(
                memory, dtype=layout.dtype, offset=offset, count=layout.num_rows * layout.row_numel(boundary)
            ).view(layout.num_rows, -1)
            for boundary, offset in layout.pieces()
        }

    def write(self, first: int, boundaries: Mapping[int, Tensor]) -> None:
        """Put every recorded boundary (B, ...) into the rows from `first` on, rounded to the layout's precision."""
        for boundary, rows in self._rows.items():
            tensor = boundaries[boundary]
            nested = tensor.permute(0, *_nesting(self.layout.forms[boundary]))
            rows[first : first + len(tensor)].copy_(nested.flatten(1))

    def read(self, rows: Rows, boundaries: Collection[int], device: torch.device) -> dict[int, Tensor]:
        """Return these rows (B, ...) of some boundaries as float32 in their recorded forms, on the device. What is
        read must not be written to."""
        return {boundary: self._read(rows, boundary, device) for boundary in boundaries}

    def _read(self, rows: Rows, boundary: int, device: torch.device) -> Tensor:
        source, form = self._rows[boundary], self.layout.forms[boundary]
        if isinstance(rows, slice):
            found = source[rows]
        else:  # on a GPU through pinned memory, which is used again when the copy is done
            found = torch.empty(len(rows), source.shape[1], dtype=source.dtype, pin_memory=device.type == "cuda")
            torch.index_select(source, 0, rows, out=found)
        found = found.to(device, non_blocking=True).float()
        nesting = _nesting(form)
        nested = found.view(len(found), *(form.shape[dim] for dim in nesting))
        places = [0] * len(form.shape)
        for place, dim in enumerate(nesting, start=1):
            places[dim] = place
        return form.conform(nested.permute(places))


def _nesting(form: Boundary) -> list[int]:
    """Return the dimensions behind the first, from the outermost in memory to the innermost."""
    return sorted(range(1, len(form.shape)), key=lambda dim: -form.stride[dim])


@dataclass(frozen=True)
class Prices:
    """Seconds of a recorded byte: to write it the first time, and to read it in a random order of rows."""

    write_s: float
    read_s: float


def sample_of(layout: Layout) -> Layout:
    """Return the same boundaries with just enough rows to measure prices on."""
    return replace(layout, num_rows=min(layout.num_rows, max(1, SAMPLE_BYTES // layout.row_bytes)))


def measure_prices(cache: Cache, *, batch_size: int, device: torch.device) -> Prices:
    """Return the prices on a cache that nothing has been written to yet; it is filled with noise."""
    layout = cache.layout
    size = min(batch_size, layout.num_rows)
    batch = {k: form.conform(torch.randn(size, *form.shape[1:], device=device)) for k, form in layout.forms.items()}
    firsts = range(0, layout.num_rows - size + 1, size)
    orders = torch.split(torch.randperm(layout.num_rows, generator=torch.Generator().manual_seed(0)), size)[
        : len(firsts)
    ]
    clock = [_now(device)]
    for first in firsts:
        cache.write(first, batch)
    clock.append(_now(device))
    cache.read(orders[0], layout.forms, device)  # finds memory for what it returns
    clock.append(_now(device))
    for rows in orders:
        cache.read(rows, layout.forms, device)
    clock.append(_now(device))
    nbytes = len(firsts) * size * layout.row_bytes
    return Prices(write_s=(clock[1] - clock[0]) / nbytes, read_s=(clock[3] - clock[2]) / nbytes)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
