"""Folders of images in ImageNet's layout: root/<split>/<class>/<image>."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from distill.data.decoding import decode
from distill.data.source import Splits
from distill.errors import ConfigError, one_of

USUAL_TEST_SPLITS = ("val", "test")


class FolderSource:
    """The images of root/<split>/<class>/, classes and files in alphabetical order; subfolders count too."""

    def __init__(self, root: Path, split: str, classes: tuple[str, ...]) -> None:
        self._root = root
        self._paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            paths = _image_paths(root, f"{split}/{name}")
            self._paths += paths
            labels += [label] * len(paths)
        if not labels:
            allowed = f"images ({', '.join(IMG_EXTENSIONS)}) under {root / split}/<class>/"
            raise ConfigError("data.root", str(root), allowed)
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        return self._paths[row]

    def open(self, row: int) -> Image.Image:
        return decode(self._root / self._paths[row])


def open_folder(*, root: str | None, train_split: str | None, test_split: str | None) -> Splits:
    """Return the images under root/<train_split> (None: train) and root/<test_split> (None: val, else test).

    Raises ConfigError when a folder is missing, has no images, or the two have different classes.
    """
    if root is None:
        raise ConfigError("data.root", root, "a folder that holds train/<class>/<image> and val/<class>/<image>")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ConfigError("data.root", root, f"an existing folder (looked for {folder.absolute()})")
    train = _find_split(folder, "train_split", train_split, usual=("train",))
    test = _find_split(folder, "test_split", test_split, usual=USUAL_TEST_SPLITS)
    _require_same_classes(folder, train=train, test=test)
    classes = _folders(folder / train)
    return Splits(
        train=FolderSource(folder, train, classes),
        open_test=functools.partial(FolderSource, folder, test, classes),
        classes=classes,
    )


def _find_split(folder: Path, setting: str, given: str | None, *, usual: tuple[str, ...]) -> str:
    if given is not None:
        if not (folder / given).is_dir():
            raise ConfigError(f"data.{setting}", given, f"a folder in {folder}: {one_of(_folders(folder), given)}")
        return given
    for name in usual:
        if (folder / name).is_dir():
            return name
    looked_for = " or ".join(str(folder / name) for name in usual)
    allowed = f"a folder that holds {looked_for}, or data.{setting}: {one_of(_folders(folder))}"
    raise ConfigError("data.root", str(folder), allowed)


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."))


def _require_same_classes(folder: Path, *, train: str, test: str) -> None:
    train_classes, test_classes = set(_folders(folder / train)), set(_folders(folder / test))
    only = {train: train_classes - test_classes, test: test_classes - train_classes}
    differences = [f"only in {split}: {', '.join(sorted(names))}" for split, names in only.items() if names]
    if differences:
        allowed = f"the same class folders in {train} and {test}; {'; '.join(differences)}"
        raise ConfigError("data.root", str(folder), allowed)


def _image_paths(root: Path, folder: str) -> list[str]:
    """Return the images under root/folder, sorted, relative to root."""
    found = []
    for parent, _, files in os.walk(root / folder, followlinks=True):
        found += [Path(parent, file) for file in files if file.lower().endswith(IMG_EXTENSIONS)]
    return sorted(path.relative_to(root).as_posix() for path in found)
