"""CIFAR-10 and CIFAR-100 in the files of their authors, downloaded where that is allowed."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.data.source import ArraySource, Splits
from distill.errors import ConfigError
from distill.storage.paths import expanded


def open_cifar(*, name: str, root: str | None, download: bool) -> Splits:
    """Return CIFAR-10 or CIFAR-100 (`name` cifar10 or cifar100) from `root`, 32 x 32 pixels.

    Raises ConfigError on data.root when it is missing, and the files are neither there nor to be had.
    """
    if root is None:
        raise ConfigError("data.root", root, f"the folder that has, or shall have, the files of {name}")
    from torchvision import datasets  # here: importing it takes seconds, which other data are not to cost

    kind, folder = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name], expanded(root)
    if not (folder / kind.base_folder).exists():
        _fetch(kind, folder, download=download)
    train, classes = _load(kind, folder, train=True)
    open_test = functools.partial(_load_test, kind, folder)
    return Splits(train=train, open_test=open_test, classes=classes)


def _load_test(kind: Any, folder: Path) -> ArraySource:
    return _load(kind, folder, train=False)[0]


def _load(kind: Any, folder: Path, *, train: bool) -> tuple[ArraySource, tuple[str, ...]]:
    try:
        with warnings.catch_warnings():
            # The published files hold dtypes in a form that numpy 2.4 deprecates.
            warnings.simplefilter("ignore", getattr(np.exceptions, "VisibleDeprecationWarning", DeprecationWarning))
            dataset = kind(folder, train=train, download=False)
    except (RuntimeError, OSError) as error:
        allowed = f"whole files in {folder / kind.base_folder} ({error}); delete that folder to have them downloaded"
        raise ConfigError("data.root", str(folder), allowed) from error
    title = f"{kind.__name__} {'train' if train else 'test'}"
    images_NHWC = torch.from_numpy(np.ascontiguousarray(dataset.data))
    source = ArraySource(images_NHWC, torch.tensor(dataset.targets, dtype=torch.int64), title=title)
    return source, tuple(dataset.classes)


def _fetch(kind: Any, folder: Path, *, download: bool) -> None:
    """Put the files into the folder, all at once, so that other ranks never see half of them."""
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    wanted = f"a folder that holds {kind.base_folder}/ (looked for {folder / kind.base_folder})"
    if not download:
        raise ConfigError("data.root", str(folder), f"{wanted}, or data.download=true to download {kind.url}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            has_archive = check_integrity(str(folder / kind.filename), kind.tgz_md5)
            archive_folder = str(folder) if has_archive else temporary
            download_and_extract_archive(kind.url, archive_folder, temporary, filename=kind.filename, md5=kind.tgz_md5)
            _move(Path(temporary) / kind.base_folder, folder / kind.base_folder)
    except (OSError, RuntimeError) as error:
        allowed = f"{wanted}, or a network to download {kind.url}, which failed ({error})"
        raise ConfigError("data.root", str(folder), allowed) from error


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if not target.exists():  # else another rank was faster, and its files are the same
            raise
