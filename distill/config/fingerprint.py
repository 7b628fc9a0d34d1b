"""What tells two jobs apart: the settings that decide what is computed, the content of what they name, the digest of
both, and the run directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill.config.choices import Cache, DataName, TeacherSource
from distill.config.outside import TEACHER, make_importable, sources
from distill.config.schema import MAPPINGS, JobConfig
from distill.config.sources import describe_module
from distill.errors import ConfigError
from distill.planning.plan import STRATEGIES
from distill.storage.contents import describe_cifar, describe_file, describe_images, describe_tables
from distill.storage.image_files import USUAL_TEST_SPLITS
from distill.storage.paths import expanded

# Raised by one whenever the same configuration comes to compute other bits: runs of before are not continued then.
RESULTS = 2

# Settings that say where and how fast a job runs, not what it computes: another value resumes the same run.
_NOT_IN_FINGERPRINT = {
    "stage", "launch", "run", "checkpoint", "device", "deploy",
    "data.root", "data.num_workers", "data.download",
    "plan.strategy", "plan.cost", "plan.teacher_ranks", "plan.groups", "plan.window", "plan.timeout_s",
    "plan.link_gbit", "plan.shared_memory", "plan.memory_gib", "plan.take_over",
    "distill.cuda_graphs", "distill.log_every",
    "teacher.cache", "teacher.folder", "cache.max_gib", "cache.dir",
}  # fmt: skip
# Of those the ones whose place does not count, but what is there.
_BY_CONTENT = {"data.root"}
# Of those the ones with a value that computes otherwise: ranks that share a batch come close, but not to the same bits.
_COMPUTES_OTHERWISE: dict[str, set[Any]] = {
    "plan.strategy": {name for name, strategy in STRATEGIES.items() if strategy.shares_batches},
    "plan.groups": {True},
}
# What the choice of candidates takes the place of.
_NOT_SEARCHED = {"student.recipe", "student.rank"}
# Settings that came after others had run: left out at the value that computes what was computed without them.
_NOT_IN_FINGERPRINT_AT: tuple[tuple[str, Any], ...] = (
    ("teacher.amp", "off"), ("distill.views", None), ("data.resize", None), ("data.interpolation", "bilinear"),
    ("data.crop_mode", "centre"), ("finetune.objective", "distillation"), ("finetune.options", {}),
    ("finetune.patience", None), ("finetune.views", None), ("finetune.ema", None), ("finetune.amp", "off"),
    ("activation.name", "keep"), ("finetune.sparsity", 0.0), ("finetune.sparsity_scope", "global"),
    ("finetune.sparsity_begin", 0.1), ("finetune.sparsity_end", 0.6),
    ("data.factory", None), ("data.options", {}), ("student.statistics_batches", 8),
    ("student.options", {}), ("student.per_block", []), ("student.align", None),
    ("search.budget.params", None), ("search.budget.flops", None), ("search.budget.bytes", None),
    ("search.budget.memory", None), ("search.budget.latency", None), ("search.sweep", None), ("search.budgets", []),
    ("search.steps", 0), ("budget.seconds", None), ("finetune.fused_views", 1), ("finetune.feature_weight", 0.0),
)  # fmt: skip

TRAIN, TEST = "data.root (training images)", "data.root (test images)"
TRAIN_ITEMS, TEST_ITEMS = "data.factory (training items)", "data.factory (test items)"

Found = Mapping[str, Any]
Memory = dict[tuple[Any, ...], Found]


def identity(config: JobConfig, seen: Memory | None = None) -> dict[str, Any]:
    """Return what decides the job's results: settings by dotted path, and in words the content of what they name.

    Reads that content: once a launch, in one place. `seen` keeps it for further configurations of the same launch.
    Recorded activations come from other batches than those that students train on, and kernels may round them
    otherwise: with a cache, wherever it is, its precision is among them. Raises ConfigError on the setting whose file
    or folder cannot be read.
    """
    found = {path: value for path, value in _by_path("", asdict(config)) if _tells_apart(path, value)}
    if config.teacher.cache is Cache.off:
        del found["cache.dtype"]
    if config.data.name not in (DataName.imagefolder, DataName.hf):
        del found["data.exif_orientation"]  # what is no file of a picture has none
    found = _searched(config, found)
    unused = [] if config.refine.on else ["refine."]
    unused += [] if config.finetune.sparsity > 0 else ["finetune.sparsity_"]
    found = {path: value for path, value in found.items() if not path.startswith(tuple(unused))}
    seen = {} if seen is None else seen
    data, teacher = config.data, config.teacher
    for read, arguments in (
        (_images, (data.name, data.root, data.train_split, data.test_split)),
        (_items, (data.factory, json.dumps(data.options), config.run.code)),
        (_weights, (teacher.source, teacher.weights)),
        (_network, (teacher.source, teacher.factory, teacher.folder)),
    ):
        key = (read.__name__, *arguments)
        if key not in seen:
            seen[key] = read(*arguments)
        found |= seen[key]
    return {**found, **_sources(config), "results": RESULTS}


def _searched(config: JobConfig, found: Found) -> dict[str, Any]:
    """Return the facts with those of a search, where there is one: its settings count then, and what it takes the place
    of does not; where latencies have a budget, so does what they are measured in, and where memory has, the batch."""
    if not config.search.on:
        return {path: value for path, value in found.items() if not path.startswith("search.")}
    found = {path: value for path, value in found.items() if path not in _NOT_SEARCHED}
    if config.search.budget.latency is None:
        return found if config.search.budget.memory is None else {**found, "deploy.batch": config.deploy.batch}
    deploy = dict(_by_path("deploy", asdict(config.deploy)))
    for name in ("programs", "int8_steps", "packed"):  # of what is chosen
        del deploy[f"deploy.{name}"]
    return {**found, **deploy, "deploy.table": _table(config.deploy.table)}


def _sources(config: JobConfig) -> Found:
    """What the source of everything from outside is, besides a teacher's."""
    try:
        return sources(asdict(config), config.run.code)
    except OSError as error:
        raise ConfigError("run.code", config.run.code, f"source that can be read ({error})") from error


def _images(name: DataName, root: str | None, train_split: str | None, test_split: str | None) -> Found:
    """What the images are, wherever they lie; a set on the hub is its name."""
    if root is None or name is DataName.digits:
        return {}
    place = expanded(root)
    if name in (DataName.cifar10, DataName.cifar100):
        return {"data.root": _read("data.root", root, lambda: describe_cifar(name.name, place))}
    if name is DataName.hf:
        return {"data.root": _read("data.root", root, lambda: describe_tables(place)) if place.exists() else root}
    if not place.is_dir():
        raise ConfigError("data.root", root, f"an existing folder (looked for {place.absolute()})")
    train = place / (train_split or "train")
    tests = [place / test_split] if test_split else [place / split for split in USUAL_TEST_SPLITS]
    splits = {TRAIN: [train], TEST: tests}
    there = {key: next((path for path in paths if path.is_dir()), None) for key, paths in splits.items()}
    return {key: _described_images(root, path) for key, path in there.items()}


def _items(factory: str | None, options: str, code: str | None) -> Found:
    """What a data set from outside gives: it is opened for that."""
    if factory is None:
        return {}
    from distill.data.items import describe  # imports torch

    make_importable(code)
    given = json.loads(options)
    return {key: describe(factory, given, train=key == TRAIN_ITEMS) for key in (TRAIN_ITEMS, TEST_ITEMS)}


def _described_images(root: str, folder: Path | None) -> str | None:
    """What is in a split's folder; None where there is none, which opening the set will explain."""
    return None if folder is None else _read("data.root", root, lambda: describe_images(folder))


def _weights(source: TeacherSource, weights: str | None) -> Found:
    """A file's content; published weights are their name."""
    if weights is None:
        return {}
    path = expanded(weights)
    if path.is_file():
        return {"teacher.weights": _read("teacher.weights", weights, lambda: describe_file(path))}
    if source in (TeacherSource.torchvision, TeacherSource.timm) and "/" not in weights:
        return {"teacher.weights": weights}
    raise ConfigError("teacher.weights", weights, "a file that exists (.safetensors, or one written by torch.save)")


def _table(table: str | None) -> str | None:
    """What another device's latencies are."""
    return None if table is None else _read("deploy.table", table, lambda: describe_file(expanded(table)))


def _network(source: TeacherSource, factory: str | None, folder: str | None) -> Found:
    """What the architecture's code is: a factory's own source, or the version of a library."""
    if source is TeacherSource.factory:
        module = TEACHER.module(factory)
        described = _read("teacher.factory", str(factory), lambda: describe_module(module, folder)) if module else None
        return {"teacher.factory (source)": described}
    if source in (TeacherSource.torchvision, TeacherSource.timm):
        try:
            return {"teacher.source (version)": f"{source.name} {version(source.name)}"}
        except PackageNotFoundError:
            return {}  # importing it will say so
    return {}


def _read(setting: str, value: str, describe: Callable[[], str | None]) -> str | None:
    try:
        return describe()
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, value) else ""
        raise ConfigError(setting, value, f"something that can be read: {error.strerror or error}{where}") from error


def _by_path(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and prefix not in MAPPINGS:
        for key, item in value.items():
            yield from _by_path(f"{prefix}.{key}" if prefix else key, item)
    elif prefix == "student.per_block":
        yield prefix, [list(entry) for entry in value.items()]  # of patterns that match one block the last decides
    else:
        yield prefix, value.name if isinstance(value, Enum) else value


def _tells_apart(path: str, value: Any) -> bool:
    if (path, value) in _NOT_IN_FINGERPRINT_AT:
        return False
    return _is_decisive(path) or value in list(_COMPUTES_OTHERWISE.get(path, ()))


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits of an identity, or of a part of one: equal for what computes the same."""
    canonical = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def in_fingerprint(key: str) -> bool:
    """Whether a setting or a group of them (a dotted path) takes part in what the fingerprint tells apart."""
    return key in _BY_CONTENT or _is_decisive(key)


def _is_decisive(key: str) -> bool:
    parts = key.split(".")
    return not any(".".join(parts[:length]) in _NOT_IN_FINGERPRINT for length in range(1, len(parts) + 1))


def run_directory(config: JobConfig, facts: Mapping[str, Any]) -> Path:
    """Return where the results of this configuration, whose identity is `facts`, go, as an absolute path."""
    name = fingerprint(facts) + (f"-{config.run.tag}" if config.run.tag else "")
    return (expanded(config.run.dir) if config.run.dir else Path("outputs") / config.run.name / name).absolute()
