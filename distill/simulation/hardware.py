"""Devices and clusters described from data sheets: seconds of operations by a roofline, joules, links. No torch.

The descriptions are YAML files in described/; a file of one's own is named by its path. Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from distill.errors import ConfigError, one_of
from distill.planning.network import Link, Network

DESCRIBED = Path(__file__).resolve().parent / "described"
PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Operation:
    """One kernel: its floating-point operations (two a multiply-add), the bytes of the tensors it reads and writes, and
    the unit that computes it (one of PRECISIONS; tf32 is what fp32 convolutions use where there is such a unit)."""

    flops: float
    moved_bytes: float
    precision: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A described device. Peaks, bandwidth, memory and board power are its data sheet's; the shares of them that
    kernels attain, the gap between kernels and the watts of an idle device are assumptions, named as such there."""

    title: str
    source: str
    peak_flops: Mapping[str, float]  # a second, dense, by precision
    memory_bytes_per_s: float
    memory_bytes: float
    board_watts: float
    idle_watts: float
    compute_share: float  # of peak_flops that a convolution attains
    memory_share: float  # of memory_bytes_per_s that an elementwise kernel attains
    launch_s: float  # between two kernels
    busy_share: float  # of board_watts that a busy device draws

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s; without tensor cores for tf32, convolutions compute in fp32.

        Raises ConfigError for bf16 where the device has no such unit.
        """
        if precision == "bf16" and "bf16" not in self.peak_flops:
            raise ConfigError("distill.amp", "bf16", f"off: the {self.title} has no unit for bf16")
        return self.peak_flops.get(precision, self.peak_flops["fp32"])

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return how long kernels take one after another: each as long as its arithmetic or its memory traffic,
        whichever is longer, and a gap.

        Source: Williams, Waterman, Patterson 2009, "Roofline", doi:10.1145/1498765.1498785.
        """
        bandwidth = self.memory_bytes_per_s * self.memory_share
        return sum(
            max(one.flops / (self.peak(one.precision) * self.compute_share), one.moved_bytes / bandwidth)
            + self.launch_s
            for one in operations
        )

    def gaps_s(self, operations: Iterable[Operation]) -> float:
        """Return how much of those seconds is gaps: it does not depend on the size of a batch."""
        return sum(self.launch_s for _ in operations)

    def joules(self, busy_s: Iterable[float], makespan_s: float) -> float:
        """Return the energy of devices that are busy for these seconds of a makespan and idle for the rest of it."""
        busy_watts = self.board_watts * self.busy_share
        return sum(busy * busy_watts + (makespan_s - busy) * self.idle_watts for busy in busy_s)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of `devices_per_node` devices each, and the links of one device within a node and to other nodes, one way;
    transfers attain `link_share` of those."""

    title: str
    source: str
    device: Device
    devices_per_node: int
    within_bytes_per_s: float
    within_latency_s: float
    between_bytes_per_s: float
    between_latency_s: float
    link_share: float

    def network(self, ranks: int) -> Network:
        """Return what joins that many ranks, one a device, node by node."""
        return Network(
            within=Link(self.within_bytes_per_s * self.link_share, self.within_latency_s),
            between=Link(self.between_bytes_per_s * self.link_share, self.between_latency_s),
            hosts=tuple(rank // self.devices_per_node for rank in range(ranks)),
            own_adapters=True,
        )


def load_device(name: str) -> Device:
    """Return a described device by its name or its file. Raises ConfigError on `device`."""
    facts = _facts("device", name, Device)
    peaks = facts["peak_flops"]
    if not isinstance(peaks, dict) or "fp32" not in peaks or not set(peaks) <= set(PRECISIONS):
        raise ConfigError(f"{name}: peak_flops", peaks, f"FLOP/s of fp32, and of {', '.join(PRECISIONS[1:])} if it has")
    numbers = {precision: _number(f"{name}: peak_flops.{precision}", peak) for precision, peak in peaks.items()}
    return Device(**facts | {"peak_flops": numbers})


def load_cluster(name: str) -> Cluster:
    """Return a described cluster by its name or its file. Raises ConfigError on `cluster`."""
    facts = _facts("cluster", name, Cluster)
    return Cluster(**facts | {"device": load_device(str(facts["device"]))})


def described(kind: str) -> list[str]:
    """Return the names of all described devices or clusters (`kind` is "device" or "cluster")."""
    return sorted(path.stem for path in (DESCRIBED / f"{kind}s").glob("*.yaml"))


def _facts(kind: str, name: str, schema: type) -> dict[str, Any]:
    """Read a description: every field of the schema, numbers checked."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else DESCRIBED / f"{kind}s" / f"{name}.yaml"
    try:
        found = safe_load(path.read_text()) if path.is_file() else None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(kind, name, f"a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(kind, name, f"a YAML file, or {one_of(described(kind), name)}")
    expected = {entry.name: entry.type for entry in fields(schema)}
    wrong = sorted(set(expected) ^ set(map(str, found)))
    if wrong:
        raise ConfigError(f"{kind} {name}", wrong[0], f"these settings and no others: {', '.join(expected)}")
    return {key: _checked(f"{name}: {key}", value, str(expected[key])) for key, value in found.items()}


def _checked(setting: str, value: Any, kind: str) -> Any:
    if kind == "float":
        share = setting.endswith("_share")
        if not 0 <= _number(setting, value) <= (1 if share else math.inf) or (share and value == 0):
            raise ConfigError(setting, value, "a number > 0 and <= 1" if share else "a number >= 0")
        return float(value)
    if kind == "int" and not (isinstance(value, int) and value >= 1):
        raise ConfigError(setting, value, "an integer >= 1")
    return value


def _number(setting: str, value: Any) -> float:
    """YAML reads 1e12 as a text and 1.0e+12 as a number: both are meant."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(setting, value, "a number")
    return found
