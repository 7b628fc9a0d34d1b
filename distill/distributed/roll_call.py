"""Where every rank runs: one exchange at the start of a job, from which all that concerns hosts follows."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass

import torch

from distill.distributed.store import Control
from distill.distributed.transport import wire_backend
from distill.machine.host import machine_identity


@dataclass(frozen=True)
class Seat:
    """One rank's place: the host's name, the machine behind it, the namespace of processes, and the GPU, if it has one.
    Containers on one machine may have names of their own, and may not see one another's processes."""

    rank: int
    host: str
    machine: str
    processes: str
    gpu: str | None = None


@dataclass(frozen=True)
class RollCall:
    """All ranks' seats, in order, and what this rank's tensors travel by."""

    seats: tuple[Seat, ...]
    wire_backend: str

    @property
    def hosts(self) -> tuple[int, ...]:
        """The number of every rank's host, a name on a machine, in the order in which ranks come upon them."""
        return self._numbered(lambda seat: (seat.machine, seat.host))

    @property
    def sharing(self) -> tuple[int, ...]:
        """Likewise for ranks that can share memory without a name: they must see one another's processes too."""
        return self._numbered(lambda seat: (seat.machine, seat.host, seat.processes))

    def _numbered(self, place_of: Callable[[Seat], Hashable]) -> tuple[int, ...]:
        places = list(dict.fromkeys(map(place_of, self.seats)))
        return tuple(places.index(place_of(seat)) for seat in self.seats)


def call_roll(control: Control, device: torch.device) -> RollCall:
    """Return where every rank runs, the same on all; every rank must call."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    own = Seat(control.rank, socket.gethostname(), machine_identity(), os.readlink("/proc/self/ns/pid"), gpu)
    control.set(f"seat/{control.rank}", asdict(own))
    if control.rank == 0:
        ranks = range(control.world_size)
        # read by one and said once: if every rank asked for every seat, the store would answer world_size squared times
        control.set("seats", [control.wait(f"seat/{rank}", peer=rank, purpose="host and device") for rank in ranks])
    found = control.wait("seats", peer=0, purpose="hosts and devices of all ranks")
    return RollCall(
        tuple(Seat(**seat) for seat in found), wire_backend(device, local_world_size=control.local_world_size)
    )
