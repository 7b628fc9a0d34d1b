"""Folders of images in ImageNet's layout: root/<split>/<class>/<image>."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from distill.data.decoding import decode
from distill.data.mapped import FileNames
from distill.data.source import Splits, readable
from distill.errors import ConfigError, one_of
from distill.storage.image_files import SUFFIXES, USUAL_TEST_SPLITS, class_folders, image_files, images_beside
from distill.storage.paths import expanded

log = logging.getLogger(__name__)

SHOWN = 5  # of the names in a warning


class FolderSource:
    """The images of root/<split>/<class>/, classes and files in alphabetical order; subfolders count too.

    What is there and is no image of a class is warned of: classes without images, images without a class.
    """

    def __init__(self, root: Path, split: str, folders: tuple[str, ...], *, upright: bool) -> None:
        self._root = root
        self._upright = upright
        paths: list[str] = []
        counts: list[int] = []
        for folder in folders:
            found = image_files(root, f"{split}/{folder}")
            paths += [name for name, _ in found]
            counts.append(len(found))
        _require_images(root / split, counts)
        _warn_of_what_has_no_class(root / split, folders, counts)
        self._paths = FileNames(paths)
        self.labels = torch.repeat_interleave(torch.tensor(counts))

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        return readable(self._paths[row])

    def open(self, row: int) -> Image.Image:
        return decode(self._root / self._paths[row], upright=self._upright)


def open_folder(*, root: str | None, train_split: str | None, test_split: str | None, upright: bool = True) -> Splits:
    """Return the images under root/<train_split> (None: train) and root/<test_split> (None: the first of val, test,
    validation, valid), turned as their EXIF orientation says where they are to be `upright`. Raises ConfigError when a
    folder is missing, has no images, is both, or the two have different classes.
    """
    folder, train, test = find_splits(root=root, train_split=train_split, test_split=test_split)
    folders = class_folders(folder / train)
    return Splits(
        train=FolderSource(folder, train, folders, upright=upright),
        open_test=functools.partial(FolderSource, folder, test, folders, upright=upright),
        classes=tuple(map(readable, folders)),
    )


def find_splits(*, root: str | None, train_split: str | None, test_split: str | None) -> tuple[Path, str, str]:
    """Return the folder of a set and the names of its training and its test split in it; raises ConfigError."""
    if root is None:
        raise ConfigError("data.root", root, "a folder that holds train/<class>/<image> and val/<class>/<image>")
    folder = expanded(root)
    if not folder.is_dir():
        raise ConfigError("data.root", root, f"an existing folder (looked for {folder.absolute()})")
    train = _find_split(folder, "train_split", train_split, usual=("train",))
    test = _find_split(folder, "test_split", test_split, usual=USUAL_TEST_SPLITS)
    _require_other_images(folder, train=train, test=test)
    _require_same_classes(folder, train=train, test=test)
    return folder, train, test


def _find_split(folder: Path, setting: str, given: str | None, *, usual: tuple[str, ...]) -> str:
    if given is not None:
        if not (folder / given).is_dir():
            raise ConfigError(f"data.{setting}", given, f"a folder in {folder}: {one_of(class_folders(folder), given)}")
        return given
    for name in usual:
        if (folder / name).is_dir():
            return name
    folders = class_folders(folder)
    allowed = f"a folder that holds {' or '.join(usual)}, or data.{setting}: {one_of(folders)}"
    if any(images_beside(folder / name) for name in folders):
        allowed += "; class folders belong into a folder for training and one with other images for testing"
    raise ConfigError("data.root", str(folder), allowed)


def _require_other_images(folder: Path, *, train: str, test: str) -> None:
    """Raise ConfigError where one split is, or lies in, the other: what was trained on would be tested on."""
    train_folder, test_folder = (folder / train).resolve(), (folder / test).resolve()
    if train_folder.is_relative_to(test_folder) or test_folder.is_relative_to(train_folder):
        allowed = f"a folder with other images than those trained on, which are in {train_folder}"
        raise ConfigError("data.test_split", str(test_folder), allowed)


def _require_same_classes(folder: Path, *, train: str, test: str) -> None:
    train_classes, test_classes = set(class_folders(folder / train)), set(class_folders(folder / test))
    only = {train: train_classes - test_classes, test: test_classes - train_classes}
    differences = [f"only in {split}: {', '.join(sorted(names))}" for split, names in only.items() if names]
    if differences:
        allowed = f"the same class folders in {train} and {test}; {'; '.join(differences)}"
        if {_folded(name) for name in only[train]} & {_folded(name) for name in only[test]}:
            allowed += " (names count as different where only their case or their way to write accents differs)"
        raise ConfigError("data.root", str(folder), allowed)


def _folded(name: str) -> str:
    """Return what names have in common that a person takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _require_images(folder: Path, counts: list[int]) -> None:
    if not sum(counts):
        allowed = f"images ({', '.join(SUFFIXES)}) under {folder}/<class>/"
        stray = images_beside(folder)
        if stray:
            allowed += f"; {len(stray)} lie in {folder} itself and so have no class"
        raise ConfigError("data.root", str(folder), allowed)


def _warn_of_what_has_no_class(folder: Path, folders: tuple[str, ...], counts: list[int]) -> None:
    """Say what a user may have meant otherwise. A class without images stays a class: others keep their numbers."""
    empty = [name for name, count in zip(folders, counts, strict=True) if not count]
    if empty:
        log.warning("no images in the class folders %s of %s", _some(empty), folder)
    stray = images_beside(folder)
    if stray:
        log.warning("left out, as they lie in no class folder of %s: %s", folder, _some(stray))
    times = Counter(map(_folded, folders))
    alike = [name for name in folders if times[_folded(name)] > 1]
    if alike:
        log.warning("different classes in %s with almost the same name: %s", folder, _some(alike))
    inner = class_folders(folder / folders[0]) if len(folders) == 1 else ()
    if len(inner) > 1 and not images_beside(folder / folders[0]):
        log.warning(
            "all images in %s are of one class, %s; if its folders %s are the classes, name it as the split",
            folder, folders[0], _some(list(inner)),
        )  # fmt: skip


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(readable, names[:SHOWN])) + more
