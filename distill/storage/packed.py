"""Weights of which many are zero, in a file that holds the others: a bit for every weight, and the values of those that
are not zero. A safetensors file, whose tensors are those of all weights in a row:

`masks` (uint8): the bits of all sparse tensors, of each in the order of its elements and filled up to whole bytes, the
first element in the lowest bit; `values.TYPE`: what is kept of all tensors, by element type; `scales` (float32): what
a value in int8 is multiplied by, one for every slice of a tensor along its first dimension. The metadata `packed` is a
JSON object: `format`, `digest` (of the tensors), and `tensors`, in their order [name, TYPE, shape, sparse, in int8].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distill.storage.checkpoint import contiguous, digest_of
from distill.storage.files import DamagedFileError, read_bytes, sealed, unsealed, write_bytes

FORMAT = 1
MASKS, VALUES, SCALES = "masks", "values.", "scales"
TYPES = {str(one).removeprefix("torch."): one for one in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)}  # fmt: skip
LARGEST = 127  # of an int8, and of its opposite


class Kept(Enum):
    """How the values that are not zero are kept."""

    exact = "exact"  # as they are
    int8 = "int8"  # matrices and kernels in steps of their largest value / 127, for every slice along dimension 0


def save_packed(path: Path, state: Mapping[str, Tensor], kept: Kept = Kept.exact) -> int:
    """Write a state dict as a packed file; return its bytes. Raises DiskError."""
    content = packed(path.name, state, kept)
    write_bytes(path, content)
    return len(content)


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict that save_packed() wrote: the very values, or in int8 those that they were rounded to; of
    a tensor under several names the first one. Raises DamagedFileError, which says what is wrong with the file."""
    file = Path(path)
    content = read_bytes(file)
    try:
        length = int.from_bytes(content[:8], "little")  # of the header, which begins a safetensors file
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        facts, tensors = unsealed(metadata["packed"], metadata["name"]), load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedFileError(file, f"damaged, or no packed file ({error})") from error
    if facts["format"] != FORMAT:
        raise DamagedFileError(file, f"format {facts['format']}, but this version reads format {FORMAT}")
    if facts["digest"] != digest_of(tensors):
        raise DamagedFileError(file, "damaged: its tensors are not those that were written")
    rest = {name: _Row(tensor) for name, tensor in tensors.items()}
    return {one[0]: _unpacked(rest, *one[1:]) for one in facts["tensors"]}


def packed(name: str, state: Mapping[str, Tensor], kept: Kept = Kept.exact) -> bytes:
    """Return the content of the packed file of that name."""
    rows: dict[str, list[Tensor]] = {}
    layout = []
    for key, tensor in contiguous(state).items():
        kind = str(tensor.dtype).removeprefix("torch.")
        assert kind in TYPES, f"{key}: {kind}"
        rounded = kept is Kept.int8 and tensor.is_floating_point() and is_matrix(tensor)
        values = tensor
        if rounded:
            values, scales = _in_int8(tensor)
            rows.setdefault(SCALES, []).append(scales)
        flat = values.flatten()
        present = (flat != 0) | flat.signbit()  # -0.0 is another value than what comes back for a zero
        sparse = 8 * int((~present).sum()) * flat.element_size() > len(flat)  # what it saves pays for the bits
        if sparse:
            rows.setdefault(MASKS, []).append(_bytes_of(present))
            flat = flat[present]
        rows.setdefault(VALUES + str(flat.dtype).removeprefix("torch."), []).append(flat)
        layout.append([key, kind, list(tensor.shape), sparse, rounded])
    tensors = {row: torch.cat(parts) for row, parts in rows.items()}
    facts = {"format": FORMAT, "digest": digest_of(tensors), "tensors": layout}
    return save(tensors, {"name": name, "packed": json.dumps(sealed(facts, name), separators=(",", ":"))})


def is_matrix(weight: Tensor) -> bool:
    """Whether a tensor has several rows of several numbers, as kernels have: neither one number for every channel, nor
    one row."""
    return weight.dim() > 1 and weight.numel() > max(len(weight), weight.shape[1:].numel()) > 0


def _in_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor's values as int8, and the scale (float32) of every slice along its first dimension."""
    rows = tensor.float().flatten(1)
    scales = rows.abs().amax(1) / LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    return (rows / scales[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


class _Row:
    """What is left to read of a row of values."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._start = tensor, 0

    def take(self, count: int) -> Tensor:
        self._start += count
        return self._tensor[self._start - count : self._start]


def _unpacked(rows: Mapping[str, _Row], kind: str, shape: list[int], sparse: bool, rounded: bool) -> Tensor:
    count, row = math.prod(shape), rows[VALUES + ("int8" if rounded else kind)] if math.prod(shape) else None
    if row is None:
        return torch.empty(shape, dtype=TYPES[kind])
    if sparse:
        present = _bits_of(rows[MASKS].take((count + 7) // 8), count)
        some = row.take(int(present.sum()))
        values = torch.zeros(count, dtype=some.dtype).masked_scatter_(present, some)
    else:
        values = row.take(count).clone()
    if rounded:
        values = (values.view(shape[0], -1).float() * rows[SCALES].take(shape[0])[:, None]).flatten()
    return values.to(TYPES[kind]).view(shape)


_PLACES = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8)


def _bytes_of(present: Tensor) -> Tensor:
    """Return bits (n) as bytes (n / 8, rounded up)."""
    padded = torch.zeros(8 * ((len(present) + 7) // 8), dtype=torch.uint8)
    padded[: len(present)] = present
    return (padded.view(-1, 8) * _PLACES).sum(1, dtype=torch.uint8)


def _bits_of(packed_bits: Tensor, count: int) -> Tensor:
    return (packed_bits[:, None] & _PLACES != 0).flatten()[:count]
