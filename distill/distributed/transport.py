"""Moves tensors between ranks: one two-rank process group per edge and direction, and one for every group of ranks that
averages. The only user of torch.distributed's process groups.

Over gloo a tensor travels in chunks of at most 512 KiB: a peer that dies between small messages is noticed at once, one
that dies in the middle of a large message only when the group's timeout passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import DistillError

CHUNK_BYTES = 512 * 1024

Store: TypeAlias = dist.Store
PairGroup: TypeAlias = Any  # ProcessGroupGloo or ProcessGroupNCCL, whose stubs lack send() and recv()


class TransportError(DistillError):
    """A peer could not be reached, died, or sent what was not expected."""


@dataclass(frozen=True)
class Edge:
    """One direction between two ranks, and what both ends must agree on."""

    source: int
    target: int
    generation: int
    timeout_s: float
    name: str = "boundaries"

    def connect(self, store: Store, rank: int, *, backend: str = "gloo") -> PairGroup:
        """Return the two-rank group of this edge as seen from `rank` (one of the two). Blocks until both call it."""
        prefix = dist.PrefixStore(f"edge/{self.generation}/{self.name}/{self.source}-{self.target}/{backend}", store)
        position = int(rank == self.target)
        try:
            return make_group(prefix, position, 2, backend=backend, timeout_s=self.timeout_s)
        except RuntimeError as error:
            other = self.source if rank == self.target else self.target
            raise TransportError(f"rank {rank}: could not connect to rank {other}: {_reason(error)}") from error

    def broken(self, rank: int, doing: str, error: BaseException) -> TransportError:
        """Return the error for a transfer that failed on `rank`: who waited for whom, for what, and where to look."""
        other = self.source if rank == self.target else self.target
        return TransportError(
            f"rank {rank}: {doing} rank {other} failed ({_reason(error)}); read logs/rank{other}.log, "
            f"or raise plan.timeout_s ({self.timeout_s:g} s) if that rank was only slow"
        )


def make_group(store: Store, rank: int, size: int, *, backend: str, timeout_s: float) -> PairGroup:
    """Return the process group of `size` ranks that meet in `store`, as seen from `rank`; blocks until all have come.

    NCCL's is the class that takes its device from the tensors it is given (the default of torch 2.15's "nccl" takes it
    from LOCAL_RANK instead), and its streams from the pool of high priority, where none of ours lie (lanes.py).
    """
    timeout = timedelta(seconds=timeout_s)
    if backend != "nccl":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit("] ", 1)[-1]


def flat(tensor: Tensor) -> Tensor:
    """Return the storage of a dense tensor, in memory order, as one dimension; no copy. Its stride order is kept by
    the receiver's buffer, so that both ends compute with the same memory layout and hence the same bits."""
    return tensor.as_strided((tensor.numel(),), (1,))


def send_tensor(group: PairGroup, tensor: Tensor) -> list[dist.Work]:
    """Start sending a dense tensor over `group`; wait for every returned work exactly once."""
    pieces = flat(tensor).view(torch.uint8)
    if tensor.is_cuda:
        return [group.send([pieces], 1, 0)]
    # all are posted at once, so every piece has a tag of its own for the other end to find it by
    return [group.send([piece], 1, tag) for tag, piece in enumerate(torch.split(pieces, CHUNK_BYTES), start=1)]


def receive_tensor(group: PairGroup, tensor: Tensor) -> list[dist.Work]:
    """Start receiving into a dense tensor; the mirror of send_tensor()."""
    pieces = flat(tensor).view(torch.uint8)
    if tensor.is_cuda:
        return [group.recv([pieces], 0, 0)]
    return [group.recv([piece], 0, tag) for tag, piece in enumerate(torch.split(pieces, CHUNK_BYTES), start=1)]


class Averager:
    """Means over a group of ranks, by one all-reduce of everything flattened, which goes on in the background; a rank
    counts by its share of rows."""

    def __init__(
        self, store: Store, *, rank: int, group: Sequence[int], share: float, timeout_s: float, backend: str
    ) -> None:
        """For `rank`, which has this share of the rows, and its group. Blocks until all of them have made theirs."""
        prefix = dist.PrefixStore(f"average/{backend}", store)
        self._rank, self._share, self._timeout_s = rank, share, timeout_s
        self._others = [peer for peer in group if peer != rank]
        self._group = make_group(prefix, group.index(rank), len(group), backend=backend, timeout_s=timeout_s)

    def __call__(self, tensors: list[Tensor]) -> Callable[[], None]:
        """Begin to average; what is returned waits for the means and puts them in the tensors' places. All ranks must
        call in the same order, with tensors of the same sizes."""
        joined = torch.cat([flat(tensor) for tensor in tensors]) * self._share
        with self._failures_explained():
            work = self._group.allreduce([joined])

        def finish() -> None:
            with self._failures_explained():
                work.wait()
            for tensor, mean in zip(tensors, torch.split(joined, [one.numel() for one in tensors]), strict=True):
                flat(tensor).copy_(mean)

        return finish

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, stacked in the order of the group. All ranks must call in the same order,
        and with tensors of the same size."""
        found = [torch.empty_like(tensor) for _ in range(1 + len(self._others))]
        with self._failures_explained():
            self._group.allgather([found], [tensor]).wait()
        return torch.stack(found)

    def close(self) -> None:
        """Leave the group; what is under way on other ranks comes to its end."""
        with self._failures_explained():
            self._group.shutdown()

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TransportError(
                f"rank {self._rank}: averaging gradients with ranks {self._others} failed ({_reason(error)}); read "
                f"their logs (logs/rank{self._others[0]}.log), or raise plan.timeout_s ({self._timeout_s:g} s)"
            ) from error


def send_blob(group: PairGroup, blob: bytes) -> None:
    """Send bytes whose length the receiver knows (finished weights); returns when they have arrived."""
    # copied: PyTorch warns of tensors over memory that cannot be written to, as bytes are
    for work in send_tensor(group, torch.frombuffer(bytearray(blob), dtype=torch.uint8)):
        work.wait()


def receive_blob(group: PairGroup, size: int) -> bytes:
    """Receive `size` bytes sent by send_blob()."""
    buffer = torch.empty(size, dtype=torch.uint8)
    for work in receive_tensor(group, buffer):
        work.wait()
    return buffer.numpy().tobytes()


def wire_backend(device: torch.device, *, local_world_size: int) -> str:
    """Return "nccl" where every rank of this node has a GPU of its own, else "gloo" (NCCL refuses to share one)."""
    if device.type != "cuda" or local_world_size > torch.cuda.device_count():
        return "gloo"
    return "nccl"
