"""From metrics/energy-*.jsonl of a run directory to joules by stage, device and rank; needs no torch and no driver.

What could not be read is absent (None) with its reason, never zero. distill/meter.py says how the files come about.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.storage.files import DamagedFileError, read_lines


def summarize(run_dir: Path) -> dict[str, Any]:
    """Return what a run has spent so far, all its attempts together, in J and s:

    {"devices": [{"host", "kind": "gpu" or "cpu", "index", "name", "uuid", "ranks": [...], "joules": {stage: J}}],
     "stages": {stage: {"seconds", "joules", "gpu_joules", "cpu_joules", "idle_devices_joules", "ranks": {"0": J}}},
     "not_measured": ["gpu on HOST: reason"], "notes": [...]}

    A device without a rank has no "ranks": its joules are in "idle_devices_joules" alone. "gpu_joules" are those of
    devices with ranks, and "ranks" divides them; "cpu_joules" are the packages' of all hosts, which belong to no rank;
    "joules" is the sum of both, of what could be read. A stage without any reading yet is not listed.
    """
    account = _Account()
    for file in sorted((run_dir / "metrics").glob("energy-*.jsonl")):
        account.add(file)
    return account.summary()


def job_joules(summary: Mapping[str, Any]) -> float | None:
    """Return the joules of all stages together, idle devices left out; None where nothing was measured.

    What is missing or damaged in a summary that was read back from a file counts as not measured.
    """
    return _sum(stage_joules(summary, stage) for stage in summary.get("stages") or {})


def stage_joules(summary: Mapping[str, Any], stage: str) -> float | None:
    """Return the joules of one stage, idle devices left out; None where they are not known."""
    try:
        return _amount(summary["stages"][stage]["joules"])
    except (KeyError, TypeError, ValueError):
        return None


def joules_per_image(summary: Mapping[str, Any], images: float | None) -> dict[str, float | None]:
    """Return joules per image of the distill stage and of the whole job ("distill", "job").

    `images` is how many the distill stage trained on, an image counted each time that a batch has it.
    """
    spent = {"distill": stage_joules(summary, "distill"), "job": job_joules(summary)}
    return {name: joules / images if joules is not None and images else None for name, joules in spent.items()}


def describe(summary: Mapping[str, Any]) -> str:
    """Return the one line that ends a job: joules by stage, or that and why nothing was measured."""
    reasons = "; ".join(summary["not_measured"])
    total = job_joules(summary)
    idle = _sum(stage["idle_devices_joules"] for stage in summary["stages"].values())
    apart = "" if idle is None else f"; idle devices, not included: {idle:.1f} J"
    if total is None:
        return f"energy: not measured ({reasons}){apart}"
    spent = {name: stage["joules"] for name, stage in summary["stages"].items() if stage["joules"] is not None}
    stages = ", ".join(f"{name} {joules:.1f} J" for name, joules in spent.items())
    missing = f"; not measured: {reasons}" if reasons else ""
    return f"energy: {stages}, together {total:.1f} J{apart}{missing}"


@dataclass
class _Device:
    """One device in one role: with ranks, or idle. `ranks` are those of all attempts."""

    host: str
    kind: str
    index: int
    name: str
    uuid: str | None
    ranks: set[int] = field(default_factory=set)
    joules: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def label(self) -> str:
        return f"GPU {self.index} ({self.name})" if self.kind == "gpu" else self.name


@dataclass(frozen=True)
class _Attempt:
    """What one attempt's first line in a host's file says: its devices by their name in the file, and their ranks."""

    generation: int
    host: str
    every_s: float
    devices: Mapping[str, tuple[_Device, list[int]]]


class _Account:
    """Adds up readings, file by file."""

    def __init__(self) -> None:
        self._devices: dict[tuple[object, ...], _Device] = {}
        self._seconds: dict[str, dict[int, dict[str, float]]] = {}  # stage, attempt, host
        self._ranks: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._missing: dict[str, None] = {}  # a set that keeps the order
        self._failed: dict[tuple[int, str], dict[str, None]] = {}  # device (by id()) and reason: stages
        self._open: dict[tuple[str, int], tuple[str, float]] = {}  # host and attempt: stage without an end, interval
        self._notes: dict[str, None] = {}
        self._last_attempt = 0

    def add(self, file: Path) -> None:
        """Take in a host's file; lines that are damaged are passed over."""
        attempts: dict[int, _Attempt] = {}
        for line in read_lines(file):
            if isinstance(line, DamagedFileError):
                self._notes[f"{file.name}: damaged lines are left out"] = None
                continue
            try:
                generation = int(line["generation"])
                self._last_attempt = max(self._last_attempt, generation)
                if "devices" in line:
                    attempts[generation] = self._attempt(line)
                elif generation in attempts:
                    self._reading(line, attempts[generation])
                else:
                    self._missing[f"attempt {generation} in {file.name}: its list of devices is damaged"] = None
            except (KeyError, TypeError, ValueError, AttributeError):
                continue

    def _attempt(self, line: Mapping[str, Any]) -> _Attempt:
        host, devices = str(line["host"]), {}
        for facts in line["devices"]:
            ranks = [int(rank) for rank in facts["ranks"]]
            key = (host, facts["kind"], facts["uuid"] or facts["index"], bool(ranks))
            device = _Device(host, facts["kind"], facts["index"], facts["name"], facts["uuid"])
            device = self._devices.setdefault(key, device)
            device.ranks |= set(ranks)
            devices[facts["id"]] = device, ranks
            if device.kind == "gpu" and len(ranks) > 1:
                shared = ", ".join(map(str, ranks))
                self._notes[f"{device.label} of {host} is shared by ranks {shared}: split equally"] = None
        self._missing |= dict.fromkeys(line["not_measured"])
        return _Attempt(int(line["generation"]), host, float(line["every_s"]), devices)

    def _reading(self, line: Mapping[str, Any], attempt: _Attempt) -> None:
        stage, event, seconds = str(line["stage"]), line["event"], _amount(line["seconds"])
        spent = [(*attempt.devices[name], _amount(joules)) for name, joules in line["joules"].items()]
        place = attempt.host, attempt.generation
        if event == "end":
            self._open.pop(place, None)
        else:
            self._open[place] = stage, attempt.every_s
        for name, reason in line["failed"].items():
            self._failed.setdefault((id(attempt.devices[name][0]), reason), {})[stage] = None
        if event == "begin":
            return
        by_host = self._seconds.setdefault(stage, {}).setdefault(attempt.generation, {})
        by_host[attempt.host] = by_host.get(attempt.host, 0.0) + seconds
        for device, ranks, joules in spent:
            device.joules[stage] += joules
            for rank in ranks if device.kind == "gpu" else ():
                self._ranks[stage][rank] += joules / len(ranks)

    def summary(self) -> dict[str, Any]:
        for (host, generation), (stage, every_s) in self._open.items():
            if generation < self._last_attempt:
                lost = f"attempt {generation} ended without a last reading on {host}, in stage {stage}"
                self._notes[f"{lost}: at most {every_s:g} s of it are not counted"] = None
        not_measured = [*self._missing]
        for device in self._devices.values():
            not_measured += self._reasons(device)
            device.joules = {stage: joules for stage, joules in device.joules.items() if joules > 0}
        if not self._seconds and not not_measured:
            not_measured = ["gpu and cpu: there are no readings in metrics/energy-*.jsonl"]
        return {
            "devices": [vars(device) | {"ranks": sorted(device.ranks)} for device in self._devices.values()],
            "stages": {stage: self._stage(stage) for stage in self._seconds},
            "not_measured": not_measured,
            "notes": [*self._notes],
        }

    def _reasons(self, device: _Device) -> Iterator[str]:
        """Say in which stages a device could not be read, or not always, or did not move: too short, or stuck."""
        for (known, reason), stages in self._failed.items():
            if known == id(device):
                when = f" (in stage {', '.join(stages)})" if device.joules else ""
                yield f"{device.kind} on {device.host}: {device.label}: {reason}{when}"
        if still := [stage for stage, joules in device.joules.items() if joules == 0]:
            reason = f"{device.label}: its counter did not move (in stage {', '.join(still)})"
            yield f"{device.kind} on {device.host}: {reason}"

    def _stage(self, stage: str) -> dict[str, Any]:
        def of(kind: str, *, busy: bool) -> float | None:
            devices = (d for d in self._devices.values() if d.kind == kind and bool(d.ranks) == busy)
            return _sum(device.joules.get(stage) for device in devices)

        gpu, cpu = of("gpu", busy=True), of("cpu", busy=True)
        return {
            "seconds": sum(max(by_host.values()) for by_host in self._seconds[stage].values()),
            "joules": _sum((gpu, cpu)),
            "gpu_joules": gpu,
            "cpu_joules": cpu,
            "idle_devices_joules": of("gpu", busy=False),
            "ranks": {str(rank): joules for rank, joules in sorted(self._ranks[stage].items()) if joules > 0},
        }


def _amount(value: Any) -> float:
    """Return a number of joules or seconds. Raises ValueError where it cannot be one."""
    amount = float(value)
    if not math.isfinite(amount) or amount < 0:
        raise ValueError(value)
    return amount


def _sum(parts: Any) -> float | None:
    """Return the sum of what is known, None where nothing is."""
    known = [part for part in parts if part is not None]
    return sum(known) if known else None
