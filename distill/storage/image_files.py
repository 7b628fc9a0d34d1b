"""Which entries of a folder are class folders and which are images, in their order. Opens no image, knows no labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from distill.errors import ConfigError

USUAL_TEST_SPLITS = ("val", "test", "validation", "valid")  # the first that is there has the test images
# What torchvision.datasets.ImageFolder takes for images, and other names of formats that Pillow reads as well.
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".jpe", ".jfif", ".gif", ".jp2", ".avif",
)  # fmt: skip
# Folders that systems put beside their users' own, besides those whose names begin with a dot: thumbnails, copies of
# what was deleted, resource forks.
OF_SYSTEMS = {
    "__MACOSX", "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "$RECYCLE.BIN",
    "System Volume Information", "lost+found", "__pycache__",
}  # fmt: skip


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders that a user has put into `folder`, in alphabetical order."""
    return tuple(sorted(entry.name for entry in _entries(folder) if _is_folder(entry)))


def image_files(root: Path, folder: str) -> list[tuple[str, os.DirEntry[str]]]:
    """Return the images anywhere under root/folder: names relative to root, in alphabetical order, and entries.

    Links are followed, though never in a circle. A link to nowhere is listed: that it cannot be read is to be said.
    """
    return sorted(_walk(root / folder, folder, above=frozenset()), key=itemgetter(0))


def images_beside(folder: Path) -> list[str]:
    """Return the names of the images that lie in `folder` itself, in alphabetical order."""
    return sorted(entry.name for entry in _entries(folder) if _is_image(entry))


def _walk(folder: Path, name: str, *, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the images under `folder`; `above` are the folders that it lies in, by device and number."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _walk(folder / entry.name, f"{name}/{entry.name}", above=above | {here})
        elif _is_image(entry):
            yield f"{name}/{entry.name}", entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself, or to where nobody may look
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to nowhere, with an image's name; to open a pipe or a device would not end."""
    if not entry.name.lower().endswith(SUFFIXES) or _is_folder(entry):
        return False
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what a user has put into the folder; raise ConfigError where it may not be looked into."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if entry.name[0] != "." and entry.name not in OF_SYSTEMS)
    except OSError as error:
        raise ConfigError("data.root", str(folder), f"a folder that can be read ({error.strerror or error})") from error
