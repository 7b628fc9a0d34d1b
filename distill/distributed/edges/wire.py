"""How boundaries travel: which tensors on which devices, and the header in front of every batch.

A message is a header (generation, step, check, rows, boundaries) and then the boundaries themselves or, where both
ranks map the same memory, the word that they are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distill.blocks.chain import Boundary
from distill.cuda.lanes import own_stream
from distill.distributed.transport import Edge, PairGroup, Store

HEADER_FIELDS = 5  # generation, step, check, rows, number of boundaries; then the boundaries


class Wire:
    """How boundaries travel between devices: whether CUDA tensors go by NCCL or are staged for gloo, and whether CPU
    tensors go through memory that ranks of one host share."""

    def __init__(self, *, device: torch.device, backend: str, shared_memory: bool = True) -> None:
        """One of these serves all edges of a rank: it takes one of the device's few streams for itself."""
        self.device = device
        self.backend = backend
        self.shared_memory = shared_memory and device.type == "cpu" and hasattr(os, "memfd_create")
        self.stream = own_stream(device, self) if device.type == "cuda" else None

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run what is inside on this wire's device and side stream; nothing to do on the CPU."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def connect(self, edge: Edge, store: Store, rank: int) -> tuple[PairGroup, PairGroup]:
        """Return the edge's groups for headers (always gloo, so that reading one needs no GPU) and for boundaries; shut
        down the latter at the end: a group of NCCL's that is only dropped breaks off what is under way."""
        headers = edge.connect(store, rank)
        return headers, edge.connect(store, rank, backend="nccl") if self.backend == "nccl" else headers

    @property
    def staged(self) -> bool:
        return self.device.type == "cuda" and self.backend == "gloo"

    @property
    def buffer_device(self) -> torch.device:
        return torch.device("cpu") if self.staged else self.device


def filled() -> Tensor:
    """Return the word that boundaries are in shared memory; also what it is received into."""
    return torch.zeros(1, dtype=torch.int64)


def empty_boundary(boundary: Boundary, device: torch.device) -> Tensor:
    """Return an uninitialised tensor of the boundary's form."""
    return torch.empty_strided(boundary.shape, boundary.stride, dtype=boundary.dtype, device=device)


def boundary_over(memory: Tensor, boundary: Boundary) -> Tensor:
    """Return a tensor of the boundary's form over these bytes (one dimension of uint8)."""
    elements = memory[: boundary.nbytes].view(boundary.dtype)
    return elements.as_strided(boundary.shape, boundary.stride)
