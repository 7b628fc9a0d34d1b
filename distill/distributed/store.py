"""The control plane: small JSON messages over the store that torchrun already runs, and heartbeats on a connection of
their own. Nothing here moves tensors and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distill.errors import DistillError

log = logging.getLogger(__name__)

POLL_S = 0.02
HEARTBEAT_S = 1.0


class PeerLostError(DistillError):
    """A rank that somebody waits for has stopped beating."""


class LeaderFailedError(PeerLostError):
    """Rank 0 has said that it failed, or the job's store, which it may serve, is gone."""


class StoreAddress:
    """How to open connections to the job's store. One client is one lock, so every thread opens its own."""

    def __init__(self, *, rank: int, world_size: int, environment: Mapping[str, str], timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._in_process = dist.HashStore() if world_size == 1 else None
        self.attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"distill/{environment.get('TORCHELASTIC_RUN_ID', 'none')}"
        if world_size == 1:
            return
        self._host, self._port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        agent_has_it = environment.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
        self._served: dist.Store | None = None
        if rank == 0 and not agent_has_it:
            # kept though nobody asks it for anything: the store ends with the object that serves it
            self._served = dist.TCPStore(self._host, self._port, is_master=True, wait_for_workers=False)

    def connect(self) -> dist.Store:
        """Return a new client of the store, seeing only this job's keys."""
        if self._in_process is not None:
            return dist.PrefixStore(self._prefix, self._in_process)
        client = dist.TCPStore(self._host, self._port, is_master=False, timeout=self._timeout)
        return dist.PrefixStore(self._prefix, client)


class Control:
    """This rank's view of the control plane. Keys live under torchrun's restart count and the run's
    generation, so that a process left over from an earlier attempt is neither heard nor believed."""

    def __init__(
        self,
        address: StoreAddress,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        local_rank: int = 0,
        local_world_size: int = 1,
    ) -> None:
        """The rank's number among the `local_world_size` ranks that were started on its node is `local_rank`."""
        self.address = address
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.local_world_size = local_world_size
        self.timeout_s = timeout_s
        self.generation = 0
        self._store = address.connect()
        self._attempt = address.attempt
        self._beats: dict[int, tuple[int, float]] = {}
        self._stop = threading.Event()
        if world_size > 1:
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def second(self) -> Control:
        """Return the same view over a connection of its own, for another thread."""
        twin = Control.__new__(Control)
        twin.__dict__ |= self.__dict__
        twin._store = self.address.connect()
        twin._beats = {}
        return twin

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._key(key), json.dumps(value))

    def get(self, key: str) -> Any:
        """Return the value of `key`, or None where nobody has set it yet."""
        value = self._read(self._key(key))
        return None if value is None else json.loads(value)

    def wait(self, key: str, *, peer: int, purpose: str, limit_s: float = math.inf) -> Any:
        """Wait for `peer` to set `key`: as long as it beats (at most plan.timeout_s after its last heartbeat), and at
        most `limit_s` where the answer needs no work of the peer's.

        Raises PeerLostError naming who waited for whom, for what, and which log to read.
        """
        self._beats.pop(peer, None)
        started = time.monotonic()
        while (value := self.get(key)) is None:
            waited_s = time.monotonic() - started
            if peer == 0:
                self.heed_leader()
            self.expect(peer, purpose=purpose, waited_s=waited_s, limit_s=limit_s)
            time.sleep(POLL_S)
        return value

    def heed_leader(self) -> None:
        """Raise LeaderFailedError if rank 0 has said that it failed."""
        if self.get("failed"):
            # rank 0 waits for this before it ends, and with it perhaps the store, so that nobody blames the store
            self.set(f"mourned/{self.rank}", True)
            raise LeaderFailedError(f"rank {self.rank}: rank 0 has failed; read logs/rank0.log")

    def expect(self, peer: int, *, purpose: str, waited_s: float = 0.0, limit_s: float = math.inf) -> None:
        """Raise PeerLostError if `peer` has not beaten for plan.timeout_s, or has been waited for longer than
        `limit_s`."""
        silence_s = self.silence_s(peer)
        if silence_s > self.timeout_s or waited_s > limit_s:
            raise PeerLostError(
                f"rank {self.rank}: no {purpose} from rank {peer} after {waited_s:.0f} s; it was last heard of "
                f"{silence_s:.0f} s ago; read logs/rank{peer}.log, or raise plan.timeout_s ({self.timeout_s:g} s)"
            )

    def store_for(self, purpose: str) -> dist.Store:
        """Return a new connection that sees only this attempt's keys for `purpose`."""
        return dist.PrefixStore(f"{self._attempt}/{self.generation}/{purpose}", self.address.connect())

    def silence_s(self, peer: int) -> float:
        """Seconds by this rank's clock since `peer`'s heartbeat was last seen to change."""
        if peer == self.rank:
            return 0.0
        now = time.monotonic()
        count = int(self._read(f"{self._attempt}/beat/{peer}") or -1)
        seen, since = self._beats.get(peer, (-2, now))
        if count != seen:
            self._beats[peer] = (count, now)
            return 0.0
        return now - since

    def count(self, key: str, amount: int = 0) -> int:
        """Add `amount` to a counter and return its value."""
        return int(self._store.add(self._key(key), amount))

    def leave(self) -> None:
        """Leave the job: rank 0 last, because its node may host the store that the others still need."""
        if self.world_size > 1:
            self.set(f"left/{self.rank}", True)
            if self.rank == 0:
                for peer in range(1, self.world_size):
                    self.wait(f"left/{peer}", peer=peer, purpose="farewell")
        self._stop.set()

    def _read(self, name: str) -> bytes | None:
        try:
            # check() first: get() alone would block until somebody sets the key
            return self._store.get(name) if self._store.check([name]) else None
        except dist.DistNetworkError as error:
            raise LeaderFailedError(
                f"rank {self.rank}: the job's store is gone, and with it the rank or node that served it; "
                "read logs/rank0.log"
            ) from error

    def _key(self, key: str) -> str:
        return f"{self._attempt}/{self.generation}/{key}"

    def _beat(self) -> None:
        try:
            store, count = self.address.connect(), 0
            while not self._stop.wait(HEARTBEAT_S if count else 0.0):
                count += 1
                store.set(f"{self._attempt}/beat/{self.rank}", str(count))
        except RuntimeError as error:
            log.warning("rank %d: its heartbeat has stopped, the job's store is gone (%s)", self.rank, error)


def ranks_of(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int, int]:
    """Return (rank, world size, local rank, local world size) as torchrun sets them; one rank where it does not."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world_size, local_rank, local_world_size = (int(environment.get(n, d)) for n, d in names.items())
    return rank, world_size, local_rank, local_world_size
