"""What tells two jobs apart: the settings that decide what is computed, their digest, and the run directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from distill.choices import Cache, DataName
from distill.config import JobConfig

# Settings that say where and how fast a job runs, not what it computes: another value resumes the same run.
_NOT_IN_FINGERPRINT = {
    "stage", "launch", "run", "checkpoint", "device",
    "data.root", "data.num_workers", "data.download",
    "plan.strategy", "plan.cost", "plan.teacher_ranks", "plan.groups", "plan.window", "plan.timeout_s",
    "plan.link_gbit", "plan.shared_memory", "plan.memory_gib", "plan.take_over",
    "distill.cuda_graphs", "distill.log_every",
    "teacher.cache", "cache.max_gib", "cache.dir",
}  # fmt: skip
# Of those the ones with a value that computes otherwise: ranks that share a batch come close, but not to the same bits.
_COMPUTES_OTHERWISE = {"plan.strategy": "ddp", "plan.groups": True}
# Settings that came after others had run: left out at the value that computes what was computed without them.
_NOT_IN_FINGERPRINT_AT = (("teacher.amp", "off"), ("distill.views", None))


def identity(config: JobConfig) -> dict[str, Any]:
    """Return the settings that decide what the job computes, by dotted path.

    Recorded activations come from other batches than those that students train on, and kernels may round them
    otherwise: with a cache, wherever it is, its precision is among them. A file of weights is named by its whole path,
    however it was typed; published weights have no file.
    """
    found = {path: value for path, value in _by_path("", asdict(config)) if _tells_apart(path, value)}
    if config.teacher.weights and (file := Path(config.teacher.weights).expanduser()).is_file():
        found["teacher.weights"] = str(file.resolve())
    if config.teacher.cache is Cache.off:
        del found["cache.dtype"]
    if config.data.name not in (DataName.imagefolder, DataName.hf):
        del found["data.exif_orientation"]  # what is no file of a picture has none
    return found


def _by_path(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and prefix != "teacher.options":
        for key, item in value.items():
            yield from _by_path(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value.name if isinstance(value, Enum) else value


def _tells_apart(path: str, value: Any) -> bool:
    if (path, value) in _NOT_IN_FINGERPRINT_AT:
        return False
    return in_fingerprint(path) or (path in _COMPUTES_OTHERWISE and _COMPUTES_OTHERWISE[path] == value)


def fingerprint(config: JobConfig) -> str:
    """Return 16 hexadecimal digits that are equal for configurations that compute the same students."""
    canonical = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def in_fingerprint(key: str) -> bool:
    """Whether a setting or a group of them (a dotted path) takes part in what the fingerprint tells apart."""
    parts = key.split(".")
    return not any(".".join(parts[:length]) in _NOT_IN_FINGERPRINT for length in range(1, len(parts) + 1))


def run_directory(config: JobConfig) -> Path:
    """Return where the results of this configuration go, as an absolute path."""
    name = fingerprint(config) + (f"-{config.run.tag}" if config.run.tag else "")
    return Path(config.run.dir or Path("outputs") / config.run.name / name).absolute()
