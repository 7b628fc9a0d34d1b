"""What joins the ranks: which are on one host, and the links within and between hosts. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

RING_SLOTS = 2  # receive buffers at the end of an edge: one being trained on, one being filled


@dataclass(frozen=True)
class Link:
    """One direction of a connection: bandwidth in bytes per second, seconds until a first byte arrives, and the seconds
    of computing that the sender loses for every byte."""

    bytes_per_s: float = math.inf
    latency_s: float = 0.0
    sender_s_per_byte: float = 0.0

    def __str__(self) -> str:
        bandwidth = f"{8e-9 * self.bytes_per_s:.3g} Gbit/s" if math.isfinite(self.bytes_per_s) else "no limit"
        return f"{bandwidth}, {1e3 * self.latency_s:.2g} ms"

    def facts(self) -> dict[str, float | None]:
        """Return the link as JSON can say it: null for a bandwidth without limit."""
        return asdict(self) | {"bytes_per_s": self.bytes_per_s if math.isfinite(self.bytes_per_s) else None}

    @classmethod
    def of_facts(cls, facts: Mapping[str, float | None]) -> Link:
        """Return the link that facts() told of."""
        return cls(**{name: math.inf if value is None else value for name, value in facts.items()})


@dataclass(frozen=True)
class Network:
    """Ranks on hosts. All that leaves a host shares its one link `between` hosts, unless its ranks have their
    `own_adapters`; ranks that are not listed in `hosts` are on host 0."""

    within: Link = Link()
    between: Link = Link()
    hosts: tuple[int, ...] = ()
    own_adapters: bool = False

    def host_of(self, rank: int) -> int:
        return self.hosts[rank] if rank < len(self.hosts) else 0

    def way_out(self, rank: int) -> int:
        """Return what tells apart the links to other hosts: ranks with the same way out share one."""
        return rank if self.own_adapters else self.host_of(rank)

    def line(self, source: int, target: int) -> tuple[str, int]:
        """Return what tells apart the lines on which ranks send: what goes over the same one leaves in turn."""
        if self.host_of(source) == self.host_of(target):
            return "inside", source
        return "out", self.way_out(source)

    @property
    def hop(self) -> Link:
        """The link that a hop from rank to rank takes at worst."""
        return self.between if len(set(self.hosts)) > 1 else self.within

    def dearer(self, part: float) -> Network:
        """Return the network with `part` of the seconds that a byte is on its way added to what it costs its sender."""
        within, between = (
            replace(link, sender_s_per_byte=link.sender_s_per_byte + part / link.bytes_per_s)
            for link in (self.within, self.between)
        )
        return replace(self, within=within, between=between)

    def resized(self, ranks: int) -> Network:
        """Return what would join that many ranks: the first of these, and more on further hosts that are as full as the
        fullest of these; on the same host where there is only one."""
        fullest = max(Counter(self.hosts).values(), default=1)
        known, first_new = self.hosts[:ranks], max(self.hosts, default=0) + 1
        more = range(ranks - len(known))
        several = first_new > 1
        return replace(self, hosts=known + tuple(first_new + n // fullest if several else 0 for n in more))

    def link(self, source: int, target: int) -> Link:
        return self.within if self.host_of(source) == self.host_of(target) else self.between

    def hop_latency_s(self, ranks: int) -> float:
        """Return the mean latency between neighbours among that many ranks: those of a group talk in a ring."""
        return sum(self.link(rank, rank + 1).latency_s for rank in range(ranks - 1)) / max(1, ranks - 1)


@dataclass(frozen=True)
class Flow:
    """Bytes that one rank sends another over the whole plan, a part of them with each of `batches` batches."""

    source: int
    target: int
    size: float
    batches: int
