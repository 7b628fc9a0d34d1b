"""Buffers for boundaries in memory that two ranks of one host share: a boundary is copied in once and read in place.

The memory has no name in any file system (memfd_create): it needs no room in /dev/shm and is gone when both processes
are, however they end. The other rank opens it through /proc, which is also the test of whether it can.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.distributed.transport import Edge, PairGroup, flat
from distill.machine.host import host_identity

ALIGNMENT = 64  # bytes, as PyTorch aligns its own CPU memory
OFFER_FIELDS = 4  # host, process, file descriptor, token; then the bytes of every boundary
MAPPED, ELSEWHERE = 0, -1  # answers to an offer; any other is an errno

log = logging.getLogger(__name__)


class SharedRing:
    """`slots` buffers for every boundary; boundary k has `sizes[k]` bytes in each slot."""

    def __init__(self, descriptor: int, sizes: Sequence[int], *, slots: int) -> None:
        """Map the memory that `descriptor` refers to. Raises OSError or ValueError where it is not such memory."""
        memory = mmap.mmap(descriptor, memory_bytes(sizes, slots=slots), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.token = whole[:8].view(torch.int64)  # tells the other rank that it has opened the right memory
        pieces = torch.split(whole[ALIGNMENT:], [_padded(size) for _ in range(slots) for size in sizes])
        self._buffers = [pieces[slot * len(sizes) : (slot + 1) * len(sizes)] for slot in range(slots)]

    def buffer(self, slot: int, boundary: int) -> Tensor:
        """Return the bytes of a boundary in a slot, one dimension of uint8; its end may be padding."""
        return self._buffers[slot][boundary]

    def fill(self, slot: int, boundary: int, tensor: Tensor) -> None:
        """Copy a dense tensor in, in memory order. NumPy does it: PyTorch would start a team of threads in every thread
        that copies."""
        piece = flat(tensor).view(torch.uint8)
        np.copyto(self.buffer(slot, boundary)[: piece.numel()].numpy(), piece.numpy())


def offer_ring(edge: Edge, group: PairGroup, sizes: Sequence[int], *, slots: int, wanted: bool) -> SharedRing | None:
    """Receiver: offer the sender memory for boundaries of these sizes; None where they must go over the group instead.

    The sender calls accept_ring() on the same group, whether memory is `wanted` or not.
    """
    ring, descriptor, reason = None, -1, 0
    offer = torch.zeros(OFFER_FIELDS + len(sizes), dtype=torch.int64)
    try:
        if wanted:
            descriptor = os.memfd_create("distill")
            os.posix_fallocate(
                descriptor, 0, memory_bytes(sizes, slots=slots)
            )  # now or never: later it would be a SIGBUS
            ring = SharedRing(descriptor, sizes, slots=slots)
            ring.token.fill_(secrets.randbits(62))
            offer[:] = torch.tensor([host_identity(), os.getpid(), descriptor, int(ring.token), *sizes])
    except OSError as error:
        ring, reason = None, error.errno or errno.EIO
    try:
        group.send([offer], 0, 0).wait()
        answer = torch.empty(1, dtype=torch.int64)
        group.recv([answer], 0, 0).wait()
    finally:
        # not before the answer: the other rank opens the memory by this process's descriptor, through /proc
        if descriptor >= 0:
            os.close(descriptor)
    reason = reason or int(answer)
    if wanted and reason not in (MAPPED, ELSEWHERE):
        log.info(
            "rank %d shares no memory with rank %d (%s): activations come over sockets", edge.target, edge.source,
            os.strerror(reason),
        )  # fmt: skip
    return ring if reason == MAPPED else None


def accept_ring(group: PairGroup, *, num_boundaries: int, slots: int) -> SharedRing | None:
    """Sender: map what the receiver offers and say so; None where this rank is on another host or cannot."""
    offer = torch.empty(OFFER_FIELDS + num_boundaries, dtype=torch.int64)
    group.recv([offer], 1, 0).wait()
    host, process, descriptor, token, *sizes = offer.tolist()
    ring, answer = None, ELSEWHERE
    if host == host_identity():
        try:
            ring = opened(Path(f"/proc/{process}/fd/{descriptor}"), sizes, slots=slots, token=token)
            answer = MAPPED
        except OSError as error:
            answer = error.errno or errno.EIO
    group.send([torch.tensor([answer])], 1, 0).wait()
    return ring


def memory_bytes(sizes: Sequence[int], *, slots: int) -> int:
    """Return how much memory a SharedRing maps."""
    return ALIGNMENT + slots * sum(map(_padded, sizes))


def opened(path: Path, sizes: Sequence[int], *, slots: int, token: int) -> SharedRing:
    descriptor = os.open(path, os.O_RDWR)
    try:
        if os.fstat(descriptor).st_size != memory_bytes(sizes, slots=slots):
            raise OSError(errno.ENXIO, "another file")  # in a process namespace of its own, that number is another's
        ring = SharedRing(descriptor, sizes, slots=slots)
    finally:
        os.close(descriptor)
    if int(ring.token) != token:
        raise OSError(errno.ENXIO, "another file")
    return ring


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
