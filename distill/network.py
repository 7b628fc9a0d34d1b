"""What joins the ranks: which are on one host, and the links within and between hosts. Plain numbers, no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Link:
    """One direction of a connection: bandwidth in bytes per second, seconds until a first byte arrives, and the seconds
    of computing that the sender loses for every byte."""

    bytes_per_s: float = math.inf
    latency_s: float = 0.0
    sender_s_per_byte: float = 0.0

    def __str__(self) -> str:
        return f"{8e-9 * self.bytes_per_s:.3g} Gbit/s, {1e3 * self.latency_s:.2g} ms"

    def facts(self) -> dict[str, float | None]:
        """Return the link as JSON can say it: null for a bandwidth without limit."""
        return asdict(self) | {"bytes_per_s": self.bytes_per_s if math.isfinite(self.bytes_per_s) else None}


@dataclass(frozen=True)
class Network:
    """Ranks on hosts. All that leaves a host shares its one link `between` hosts; ranks that are not listed in `hosts`
    are on host 0."""

    within: Link = Link()
    between: Link = Link()
    hosts: tuple[int, ...] = ()

    def host_of(self, rank: int) -> int:
        return self.hosts[rank] if rank < len(self.hosts) else 0

    def link(self, source: int, target: int) -> Link:
        return self.within if self.host_of(source) == self.host_of(target) else self.between
