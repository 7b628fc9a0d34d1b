"""The energy counters of this machine: every GPU's by NVML, every CPU package's by RAPL, or why there is none.

Knows nothing of ranks, stages or files of a run; needs no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pynvml

from distill.errors import DistillError

POWERCAP = Path("/sys/class/powercap")  # Intel and AMD alike, whatever the zones are called


class CounterError(DistillError):
    """A counter cannot be read, or what it says cannot be true."""


@dataclass(frozen=True)
class Counter:
    """One device's energy counter. `read` returns its state in counts of `joules_per_count`, or raises CounterError.

    `wraps_at` is the number of counts after which it starts from zero again; None: it never does.
    """

    kind: str  # "gpu" or "cpu"
    index: int
    name: str
    uuid: str | None
    read: Callable[[], int]
    joules_per_count: float
    wraps_at: int | None = None

    def joules(self, before: int, after: int) -> float:
        """Return the energy in J between two states. Raises CounterError where the counter was reset between them.

        A wrap is believed up to half of the range: a reset looks like a wrap too, mostly like a longer one.
        """
        counts = after - before
        if counts < 0 and self.wraps_at is not None and counts + self.wraps_at <= self.wraps_at / 2:
            counts += self.wraps_at
        if counts < 0:
            raise CounterError("its counter went backwards (reset by the driver?)")
        return counts * self.joules_per_count


@dataclass(frozen=True)
class Counters:
    """What was found, and in words what was not: pairs of a kind ("gpu", "cpu") and a reason."""

    found: tuple[Counter, ...]
    missing: tuple[tuple[str, str], ...]


@contextmanager
def open_counters(powercap: Path = POWERCAP) -> Iterator[Counters]:
    """Find all counters of this machine, also those of GPUs that CUDA_VISIBLE_DEVICES hides; NVML is shut down after.

    Nothing here fails for want of a device, a driver or a permission.
    """
    packages, without_package = _packages(powercap)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Counters(tuple(packages), (("gpu", f"NVML: {error}"), *without_package))
        return
    try:
        boards, without_board = _boards()
        yield Counters((*boards, *packages), (*without_board, *without_package))
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _boards() -> tuple[list[Counter], list[tuple[str, str]]]:
    """Return the GPUs' counters: millijoules in 64 bits since the driver was loaded (Volta and newer)."""
    found: list[Counter] = []
    missing: list[tuple[str, str]] = []
    try:
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return [], [("gpu", f"NVML: {error}")]
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
        except pynvml.NVMLError as error:
            missing.append(("gpu", f"GPU {index}: {error}"))
            continue
        if _is_divided(handle):
            missing.append(("gpu", f"GPU {index} ({name}): MIG is on; an instance's share of the board is not counted"))
            continue
        found.append(Counter("gpu", index, name, bare_uuid(uuid), partial(_millijoules, handle), 1e-3))
    if count == 0:
        missing.append(("gpu", "NVML: it lists no GPU"))
    return found, missing


def _is_divided(handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except pynvml.NVMLError:  # a board that knows no MIG
        return False


def _millijoules(handle: Any) -> int:
    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except pynvml.NVMLError as error:
        raise CounterError(f"NVML: {error}") from error


def bare_uuid(uuid: str) -> str:
    """Return a device's UUID as torch writes it: lower case, without NVML's "GPU-"."""
    return uuid.lower().removeprefix("gpu-")


def _packages(powercap: Path) -> tuple[list[Counter], list[tuple[str, str]]]:
    """Return the counters of the CPU packages, in microjoules. Sub-domains (core, dram) lie within a package, and
    "psys" around all of them: counting either would count twice."""
    found: list[Counter] = []
    missing: list[tuple[str, str]] = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        number = zone.name.removeprefix("intel-rapl:")
        try:
            name = (zone / "name").read_text().strip() if number.isdecimal() else ""
        except OSError as error:
            missing.append(("cpu", _refused(zone / "name", error)))
            continue
        if name.startswith("package"):
            counter = zone / "energy_uj"
            found.append(Counter("cpu", int(number), name, None, partial(_number, counter), 1e-6, _range(zone)))
    if not found and not missing:
        missing.append(("cpu", f"no RAPL package in {powercap} (no driver, or hidden from a virtual machine)"))
    return sorted(found, key=lambda counter: counter.index), missing


def _range(zone: Path) -> int | None:
    try:
        return _number(zone / "max_energy_range_uj")
    except CounterError:
        return None


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError as error:
        raise CounterError(_refused(path, error)) from error
    except ValueError as error:
        raise CounterError(f"{path} holds no number") from error


def _refused(path: Path, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{path} not readable (permission denied); allow it with `chmod a+r {path}` or run as root"
    return f"{path} not readable ({error.strerror or error})"
