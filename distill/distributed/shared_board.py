"""Small tensors that all ranks of one host show each other in memory: an exchange takes some ten microseconds, one over
sockets a millisecond, for waking threads. Batch norms that share their statistics have two in every layer.

Every rank has two pages that it alone writes, in turn: it writes its next exchange but one only when all have shown the
next, and so have read this one.
"""

from __future__ import annotations

import os
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.distributed.edges.shared_ring import SharedRing, memory_bytes, opened
from distill.distributed.transport import TransportError, flat
from distill.machine.host import host_identity

HEAD = 16  # bytes of a page: which exchange it has, and a checksum, by which all of it is known to have arrived
PAGE = 64 * 1024  # bytes; what is larger goes the other way
SPINS = 2000  # looks at a page, about a millisecond, after which a rank sleeps between two
NAP_S, LOOK_S = 2e-4, 1.0  # of a rank that waits for long; and after which it sees whether the others live

Gather = Callable[[Tensor], Tensor]


class SharedBoard:
    """Shows a tensor to all ranks, and returns what they show."""

    def __init__(
        self, ring: SharedRing, *, rank: int, processes: Sequence[int], timeout_s: float, otherwise: Gather
    ) -> None:
        """`processes` are those of all ranks; what is too large, or on a GPU, is gathered `otherwise`."""
        ranks = range(len(processes))
        self._pages = [[ring.buffer(slot, peer).numpy() for peer in ranks] for slot in range(2)]
        self._heads = [[page[:HEAD].view(np.int64) for page in pages] for pages in self._pages]
        self._rank, self._processes, self._timeout_s, self._otherwise = rank, processes, timeout_s, otherwise
        self._number = 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, stacked in their order. All ranks must call in the same order, and with
        tensors of the same size and type. Raises TransportError where a rank has ended or shows nothing in time."""
        if tensor.is_cuda or tensor.nbytes > PAGE - HEAD:
            return self._otherwise(tensor)
        self._number += 1
        slot, shown = self._number % 2, flat(tensor.contiguous()).view(torch.uint8).numpy()
        head = self._heads[slot][self._rank]
        self._pages[slot][self._rank][HEAD : HEAD + len(shown)] = shown
        head[1] = zlib.crc32(shown.data)
        head[0] = self._number
        found = np.empty((len(self._processes), len(shown)), np.uint8)
        for peer, row in enumerate(found):
            row[:] = shown if peer == self._rank else self._read(slot, peer, len(shown))
        return torch.from_numpy(found).view(tensor.dtype).view(-1, *tensor.shape)

    def _read(self, slot: int, peer: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        head, page = self._heads[slot][peer], self._pages[slot][peer]
        start, looks = time.monotonic(), 0
        looked = start
        while True:
            if head[0] == self._number:
                row = page[HEAD : HEAD + length].copy()
                if zlib.crc32(row.data) == head[1]:  # else not all of it is to be seen yet
                    return row
            looks += 1
            time.sleep(0.0 if looks < SPINS else NAP_S)  # even of nothing: other threads of this process get their turn
            if looks > SPINS and (now := time.monotonic()) - looked > LOOK_S:
                looked = now
                self._refuse_to_wait(peer, now - start)

    def _refuse_to_wait(self, peer: int, seconds: float) -> None:
        if not _lives(self._processes[peer]):
            raise TransportError(f"rank {self._rank}: rank {peer} has ended amid a step; read logs/rank{peer}.log")
        if seconds > self._timeout_s:
            raise TransportError(
                f"rank {self._rank}: rank {peer} has shown no statistics in {self._timeout_s:g} s; read "
                f"logs/rank{peer}.log, or raise plan.timeout_s"
            )


def share_board(*, rank: int, world_size: int, gather: Gather, timeout_s: float, wanted: bool) -> SharedBoard | None:
    """Return the board of all ranks; None where they are not on one host, or memory cannot be shared there. Every rank
    must call it, each with the same `wanted`; `gather` is how they exchange tensors so far."""
    if not wanted or not hasattr(os, "memfd_create"):
        return None
    sizes, ring, descriptor = [PAGE] * world_size, None, -1
    offer = torch.tensor([host_identity(), os.getpid(), -1, 0])
    try:
        if rank == 0:
            with suppress(OSError):
                descriptor = os.memfd_create("distill")
                os.posix_fallocate(descriptor, 0, memory_bytes(sizes, slots=2))  # now, or later a SIGBUS
                ring = SharedRing(descriptor, sizes, slots=2)
                ring.token.fill_(secrets.randbits(62))
                offer[2:] = torch.tensor([descriptor, int(ring.token)])
        offers = gather(offer)
        (host, process, opens, token), processes = offers[0].tolist(), offers[:, 1].tolist()
        if rank != 0 and host == int(offer[0]) and opens >= 0:
            with suppress(OSError):
                ring = opened(Path(f"/proc/{process}/fd/{opens}"), sizes, slots=2, token=token)
        able = ring is not None and all(map(_lives, processes))  # of other containers nothing is seen
        everybody = bool(gather(torch.tensor([int(able)])).all())
    finally:
        # not before all have answered: they open the memory by this process's descriptor
        if descriptor >= 0:
            os.close(descriptor)
    if ring is None or not everybody:
        return None
    return SharedBoard(ring, rank=rank, processes=processes, timeout_s=timeout_s, otherwise=gather)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True
