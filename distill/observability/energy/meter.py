"""The meter of one host: reads its energy counters around and during every stage and appends what was spent to a file.

Increments, not totals: what an attempt spent until its last reading is kept when it is killed. Knows neither torch nor
how ranks talk. The file, metrics/energy-<host>.jsonl, holds for every attempt one line about host and devices and then
one line a reading; distill/energy.py sums it up.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.observability.energy.counters import Counter, CounterError, Counters, bare_uuid
from distill.storage.files import DiskError, append_json

log = logging.getLogger(__name__)

# An AMD package's counter wraps at 65.5 kJ, and only half of the range can be told from a reset: enough for 1.09 kW.
EVERY_S = 30.0


@dataclass(frozen=True)
class Place:
    """Where a rank runs. `machine` tells hosts of one name apart; `uuid` is its CUDA device's, None on the CPU."""

    rank: int
    host: str
    machine: str
    uuid: str | None


def by_host(places: Iterable[Place]) -> dict[str, list[Place]]:
    """Return the places by host, each in order of ranks. Hosts of the same name get a piece of `machine` added, and one
    machine under several names (containers) is one host: its counters must not be read twice."""
    machines: dict[str, list[Place]] = {}
    for place in sorted(places, key=lambda place: place.rank):
        machines.setdefault(place.machine, []).append(place)
    names = [group[0].host for group in machines.values()]
    return {
        group[0].host if names.count(group[0].host) == 1 else f"{group[0].host}-{machine[:8]}": group
        for machine, group in machines.items()
    }


class Meter:
    """Appends this host's energy by stage, at the ends of a stage and in between from a thread. Never stops the job."""

    def __init__(
        self,
        run_dir: Path,
        *,
        host: str,
        places: Iterable[Place],
        counters: Counters,
        generation: int,
        every_s: float = EVERY_S,
    ) -> None:
        self._path = run_dir / "metrics" / f"energy-{re.sub(r'[^A-Za-z0-9._-]', '_', host)}.jsonl"
        self._counters = {f"{counter.kind}{counter.index}": counter for counter in counters.found}
        self._generation = generation
        self._every_s = every_s
        self._stage: str | None = None
        self._counts: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._read_at = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_reading, name="energy", daemon=True)
        self._write(self._facts(host, list(places), counters))

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.switch(None)

    def switch(self, stage: str | None) -> None:
        """From now on what is spent belongs to `stage`; None: to no stage, and it is not counted."""
        with self._lock:
            if stage == self._stage:
                return
            if self._stage is not None:
                self._read("end")
            self._stage = stage
            if stage is not None:
                self._read("begin")

    def sample(self) -> None:
        """Count what the running stage, if there is one, has spent since the last reading."""
        with self._lock:
            if self._stage is not None:
                self._read("sample")

    def _keep_reading(self) -> None:
        while not self._stop.wait(self._every_s):
            self.sample()

    def _read(self, event: str) -> None:
        now, begins = time.monotonic(), event == "begin"
        joules: dict[str, float] = {}
        failed: dict[str, str] = {}
        for name, counter in self._counters.items():
            before = None if begins else self._counts.get(name)
            try:
                spent = self._advance(name, counter, before)
            except CounterError as error:
                failed[name] = self._reasons[name] = str(error)
                continue
            if spent is not None:
                joules[name] = spent
            elif not begins:  # readable again, but nobody knows what it was when this interval began
                failed[name] = self._reasons[name]
        seconds = 0.0 if begins else now - self._read_at
        self._read_at = now
        record = {"generation": self._generation, "stage": self._stage, "event": event, "seconds": seconds}
        self._write(record | {"joules": joules, "failed": failed})

    def _advance(self, name: str, counter: Counter, before: int | None) -> float | None:
        """Read a counter and remember its state; return the joules since `before`, None where that is not known."""
        self._counts.pop(name, None)
        count = self._counts[name] = counter.read()
        return None if before is None else counter.joules(before, count)

    def _facts(self, host: str, places: list[Place], counters: Counters) -> Mapping[str, Any]:
        ranks = [place.rank for place in places]
        listed = {counter.uuid for counter in counters.found if counter.uuid is not None}
        devices = []
        for name, counter in self._counters.items():
            facts = {"id": name, "kind": counter.kind, "index": counter.index, "name": counter.name}
            users = [place.rank for place in places if place.uuid and bare_uuid(place.uuid) == counter.uuid]
            devices.append(facts | {"uuid": counter.uuid, "ranks": ranks if counter.kind == "cpu" else users})
        missing = [f"{kind} on {host}: {reason}" for kind, reason in counters.missing]
        missing += [
            f"gpu on {host}: the device of rank {place.rank} ({place.uuid}) is none of the boards that NVML lists"
            for place in places
            if listed and place.uuid and bare_uuid(place.uuid) not in listed
        ]
        return {
            "generation": self._generation,
            "host": host,
            "ranks": ranks,
            "every_s": self._every_s,
            "devices": devices,
            "not_measured": missing,
        }

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            append_json(self._path, record)
        except DiskError as error:
            log.warning("energy: a reading is lost: %s", error)
