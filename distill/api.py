"""The library: what the program does, called from Python in one process, on the CPU or one GPU.

A network and data that are at hand are lent to the job as if a module had them: the settings teacher.factory and
data.factory name it, and everything behind is the job of one rank.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from distill.blocks import cut as blocks_cut
from distill.blocks.chain import Chain
from distill.config.compose import compose
from distill.data.addressing import fixed_fifth
from distill.errors import ConfigError, one_of
from distill.job import run_alone
from distill.reporting import write_report
from distill.storage.checkpoint import contiguous
from distill.storage.files import read_json, write_bytes
from distill.student.files import load_student


@dataclass(frozen=True)
class Result:
    """What compress() has made: the student, in eval mode on the CPU; what was found (metrics.json); and the run
    directory with the student's files, its programs and report.html."""

    student: nn.Module
    metrics: Mapping[str, Any]
    run_dir: Path


def cut(model: nn.Module, sample: Tensor, *, granularity: str = "residual", modules: Sequence[str] = ()) -> Chain:
    """Return `model` as a chain of blocks, each with one tensor in and one out.

    `sample` (B, C, H, W) is an input on the model's device. `granularity` is conv, residual, resolution, or modules:
    then `modules` are module paths, or shell patterns of them. The chain shares the model's tensors, and the model is
    put in eval mode and frozen. Raises ConfigError where it cannot be cut so.
    """
    names = [one.name for one in blocks_cut.Granularity]
    if granularity not in names:
        raise ConfigError("granularity", granularity, one_of(names, granularity))
    return blocks_cut.cut(model, sample, granularity=blocks_cut.Granularity[granularity], modules=modules)


def compress(
    model: nn.Module,
    train: Dataset[Any] | DataLoader[Any],
    test: Dataset[Any] | DataLoader[Any] | None = None,
    *,
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
) -> Result:
    """Return a cheaper student of `model`, trained on the images of `train` and judged on those of `test`.

    The data are map-style sets of (image, label), or loaders of them, of which only the set and the batch size are
    used: an image is a tensor (C, S, S) with C 1 or 3 as `model` takes it (see docs/data.md), a label a whole number
    from 0 on. Without `test`, a fifth of `train` is kept for it. `overrides` are settings as on the command line
    ("distill.steps=500", "student.recipe=one_conv"); `run_dir` is where the results go, else outputs/. `model` is left
    as it is. The same call again goes on where an earlier one was, or finds what it made.

    Raises DistillError (ConfigError, where a setting or an argument is at fault).
    """
    dataset, batch_size = _set_of(train)
    if test is None:
        rows, kept = fixed_fifth(len(dataset))  # type: ignore[arg-type]
        dataset, held = Subset(dataset, rows.tolist()), Subset(dataset, kept.tolist())
    else:
        held, _ = _set_of(test)  # type: ignore[assignment]
    side = _side_of(dataset)
    with _lent(model, dataset, held) as (module, weights):
        given = [
            "teacher=custom",
            f"teacher.factory={module}:teacher",
            f"teacher.weights={weights}",
            "teacher.fit.epochs=0",
            "data=custom",
            f"data.factory={module}:data",
            f"data.image_size={side}",
            f"data.batch_size={min(batch_size, len(dataset) // 2)}",  # type: ignore[arg-type]
            "data.mean=[0,0,0]",
            "data.std=[1,1,1]",
            "data.num_workers=0",
            *([f"run.dir={run_dir}"] if run_dir is not None else []),
        ]
        path = run_alone(compose([*given, *overrides]))
    student = load_student(path, factory=lambda **_: copy.deepcopy(model).cpu())
    return Result(student, read_json(path / "metrics.json"), path)


def report(run: str | Path) -> Path:
    """Write report.html of a run directory anew, also of an unfinished or failed run; return its path."""
    return write_report(Path(run))


def _set_of(data: Dataset[Any] | DataLoader[Any]) -> tuple[Dataset[Any], int]:
    """Return a map-style set and a batch size."""
    dataset, batch_size = (data.dataset, data.batch_size or 128) if isinstance(data, DataLoader) else (data, 128)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        allowed = "a map-style data set, or a loader of one: batches are named by their step, and read in any order"
        raise ConfigError("train, test", type(dataset).__name__, allowed)
    return dataset, batch_size


def _side_of(dataset: Dataset[Any]) -> int:
    image = dataset[0][0]
    if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[1] != image.shape[2]:
        form = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ConfigError("train", form, "items (image, label) with images as tensors (channels, S, S)")
    return int(image.shape[1])


@contextmanager
def _lent(model: nn.Module, train: Dataset[Any], test: Dataset[Any]) -> Iterator[tuple[str, Path]]:
    """Yield the name of a module that has the network and the data, and a file with the network's weights.

    The name tells networks apart: with the weights and the items' content, which count by themselves, it is the run's
    identity.
    """
    described = f"{type(model).__module__}.{type(model).__qualname__}\n{_source_of(model)}\n{model!r}"
    name = f"distill_lent_{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    module = ModuleType(name, "What a call of distill.compress() was given.")
    module.teacher = lambda num_classes: copy.deepcopy(model).cpu()  # type: ignore[attr-defined]
    sets = {True: train, False: test}
    module.data = lambda train: sets[train]  # type: ignore[attr-defined]
    sys.modules[name] = module
    try:
        with tempfile.TemporaryDirectory(prefix="distill-") as folder:
            weights = Path(folder) / "model.safetensors"
            write_bytes(weights, save(contiguous(model.state_dict())))
            yield name, weights
    finally:
        del sys.modules[name]


def _source_of(model: nn.Module) -> str:
    """Return the source of the network's class; nothing where there is none, as in an interactive session."""
    try:
        return inspect.getsource(type(model))
    except (OSError, TypeError):
        return ""
