"""Where a rank's readings go while it trains: metrics/rankN.jsonl, TensorBoard, and rank 0's display."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import asdict

import torch

from distill.distributed.store import Control
from distill.job.context import Context
from distill.storage.files import json_line, open_to_add
from distill.training.trainer import Reading

RANK_EVERY_S = 2.0  # seconds between two points of a rank's own curves


class Readings:
    """Takes this rank's readings; `names` are those of all units. Also saves the trace now and then."""

    def __init__(self, context: Context, names: Mapping[int, str]) -> None:
        self._context, self._names = context, names
        self._path = context.run.path / "metrics" / f"rank{context.rank}.jsonl"
        self._file = open_to_add(self._path)
        self._latest: dict[int, dict[str, float]] = {}
        self._shares = _Shares(context)

    def add(self, reading: Reading) -> None:
        context, values = self._context, asdict(reading)
        record = values | {"generation": context.control.generation, "time_s": time.time()}
        self._file.write(json_line(record, self._path.name))
        self._file.flush()
        self._latest[reading.unit] = values
        context.control.set(f"readings/{context.rank}", self._latest)
        name = self._names[reading.unit]
        context.scalars.add(f"loss/{name}", reading.loss, reading.step)
        context.scalars.add(f"relative_error/{name}", reading.relative_error, reading.step)
        context.scalars.add(f"learning_rate/{name}", reading.lr, reading.step)
        self._shares.add(reading.step)
        context.trace.save_sometimes(context.run.path / "traces")

    def close(self) -> None:
        """End the stage's records; rank 0 reads the trace for the report after this."""
        self._shares.add(max((int(latest["step"]) for latest in self._latest.values()), default=0), last=True)
        self._file.close()
        self._context.trace.save(self._context.run.path / "traces")


class _Shares:
    """The rank's own curves: what it spends its time on, steps a second, and the memory it has had at most."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._since, self._step = time.monotonic(), 0
        self._seconds = dict.fromkeys(("teacher", "student", "wait"), 0.0)

    def add(self, step: int, *, last: bool = False) -> None:
        elapsed_s = time.monotonic() - self._since
        if (elapsed_s < RANK_EVERY_S and not last) or step <= self._step:
            return
        scalars = self._context.scalars
        for kind, before in self._seconds.items():
            self._seconds[kind] = self._context.trace.seconds(kind)
            scalars.add(f"rank/{kind}_share", (self._seconds[kind] - before) / elapsed_s, step)
        scalars.add("rank/steps_per_second", (step - self._step) / elapsed_s, step)
        scalars.add("rank/peak_memory_gib", peak_memory_bytes(self._context.device) / 2**30, step)
        self._since, self._step = time.monotonic(), step


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has had so far: on the GPU where it works on one, else of the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def latest_readings(control: Control) -> dict[int, dict[str, float]]:
    """Return the last reading of every unit that has one, over all ranks: a unit may have been on several."""
    latest: dict[int, dict[str, float]] = {}
    for rank in range(control.world_size):
        for unit, reading in (control.get(f"readings/{rank}") or {}).items():
            latest[int(unit)] = max(latest.get(int(unit), reading), reading, key=lambda found: found["step"])
    return latest
