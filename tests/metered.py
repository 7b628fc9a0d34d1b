"""What the tests of counters, meters and energy share: made-up RAPL zones, ranks on devices, and attempts on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.observability.energy.counters import open_counters
from distill.observability.energy.meter import Meter, Place

A, B = "aaaa-0001", "bbbb-0002"  # UUIDs of two boards, as torch writes them
WRAP = 65_532_610_987  # microjoules: max_energy_range_uj of an AMD package


def zone(powercap: Path, number: str = "0", name: str = "package-0", *, start: int = 0) -> Path:
    """Make a RAPL zone; return the file of its counter."""
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text(f"{WRAP}\n")
    (folder / "energy_uj").write_text(f"{start}\n")
    return folder / "energy_uj"


def places(*uuids: str | None, host: str = "a") -> list[Place]:
    """Ranks 0, 1, ... of one host on these devices."""
    return [Place(rank, host, f"machine of {host}", uuid) for rank, uuid in enumerate(uuids)]


@contextmanager
def metered(
    run_dir: Path, powercap: Path, where: list[Place], *, generation: int = 1, host: str = "a", every_s: float = 3600.0
) -> Iterator[Meter]:
    with (
        open_counters(powercap) as counters,
        Meter(run_dir, host=host, places=where, counters=counters, generation=generation, every_s=every_s) as meter,
    ):
        yield meter


def killed(
    run_dir: Path, powercap: Path, where: list[Place], work: Callable[[Meter], None], *, generation: int
) -> None:
    """An attempt that is killed: its meter is never closed."""
    with open_counters(powercap) as counters:
        work(Meter(run_dir, host="a", places=where, counters=counters, generation=generation))
