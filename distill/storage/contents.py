"""Digests of what settings name instead of say: files and sets of images, by content and wherever they lie.

Knows no settings and no torch. Files are read whole where that is cheap; of larger sets, the names and sizes of all
files are, and the content of some. What took long to read is noted in the user's cache, with a stamp that any write to
the files changes.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distill.errors import DistillError
from distill.storage.files import read_json, write_json
from distill.storage.image_files import class_folders, image_files

WHOLE_FILES, WHOLE_BYTES = 4096, 256 * 2**20  # a set within both is read whole: a second or so
SAMPLED_FILES, SAMPLED_PIECES, PIECE = 512, 8, 64 * 2**10  # of others
NOTED_BYTES = 64 * 2**20  # a digest of less is not worth a note
SETTLED_NS = 10 * 10**9  # what was written this recently may be written again within the same tick of a file's clock
DIGITS = 16  # hexadecimal, as they are shown

# The files of their authors, by MD5: a folder that lacks them gets just these.
_CIFAR10 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}  # fmt: skip
_CIFAR100 = {
    "train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}  # fmt: skip
CIFAR = {"cifar10": ("cifar-10-batches-py", _CIFAR10), "cifar100": ("cifar-100-python", _CIFAR100)}
AS_PUBLISHED = "as published"


@dataclass(frozen=True)
class Listed:
    """One file: its path, its name within its set, and what the file system says of it."""

    path: str
    name: str
    size: int
    stamp: tuple[int, int, int]  # times of the last change to content and inode in ns, and the inode

    @property
    def changed_ns(self) -> int:
        return max(self.stamp[:2])

    @classmethod
    def at(cls, path: str, name: str) -> Listed:
        found = os.stat(path)
        return cls(path, name, found.st_size, (found.st_mtime_ns, found.st_ctime_ns, found.st_ino))


def describe_file(path: Path) -> str:
    """Return a file's content in a few digits. Raises OSError."""
    listed = Listed.at(str(path), "")
    return f"content {_remembered(path, [listed], lambda: _hash_whole(hashlib.sha256(), listed.path))}"


def describe_images(folder: Path) -> str:
    """Return what is in folder/<class>/: how many images of which classes, and digits that tell it from another set.

    What is no image of the user's is not part of it (see image_files.py). Raises OSError.
    """
    classes = class_folders(folder)
    listed = [one for name in classes for one in image_files(folder, name)]
    images = [Listed.at(entry.path, name) for name, entry in listed if _leads_somewhere(entry)]
    digest = _remembered(folder, images, lambda: _digest_of(images, classes))
    some = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
    return _printable(f"{len(images)} images of {len(classes)} classes ({some}), content {digest}")


def _leads_somewhere(entry: os.DirEntry[str]) -> bool:
    return not entry.is_symlink() or os.path.exists(entry.path)


def describe_tables(place: Path) -> str:
    """Return what is in a parquet file, or in the parquet files of a folder, its folders and those of its data/."""
    if place.is_file():
        files = [Listed.at(str(place), "")]
    else:
        patterns = ("*.parquet", "*/*.parquet", "data/*/*.parquet")
        paths = sorted({path for pattern in patterns for path in place.glob(pattern)})
        files = [Listed.at(str(path), path.relative_to(place).as_posix()) for path in paths]
    digest = _remembered(place, files, lambda: _digest_of(files))
    size = sum(file.size for file in files) / 1e6
    return f"{len(files)} parquet files of {size:.1f} MB, content {digest}"


def describe_cifar(name: str, root: Path) -> str:
    """Return AS_PUBLISHED where `root` has the published files, or none yet; else digits of what it has instead."""
    folder, published = CIFAR[name]
    try:
        files = [Listed.at(entry.path, entry.name) for entry in os.scandir(root / folder) if entry.is_file()]
    except FileNotFoundError:
        return AS_PUBLISHED
    known = [file for file in files if file.name in published]
    return _remembered(root / folder, files, lambda: _as_published(known, published) or f"content {_digest_of(files)}")


def _as_published(files: Sequence[Listed], published: dict[str, str]) -> str:
    found = {file.name: _hash_whole(hashlib.md5(usedforsecurity=False), file.path, digits=32) for file in files}
    return AS_PUBLISHED if found == published else ""


def _digest_of(files: Iterable[Listed], classes: Sequence[str] = ()) -> str:
    """Return digits that depend on the classes, on names and sizes of all files, and on the content of all or some."""
    files = sorted(files, key=lambda file: file.name)
    whole = len(files) <= WHOLE_FILES and sum(file.size for file in files) <= WHOLE_BYTES
    every = 1 if whole else max(1, len(files) // SAMPLED_FILES)
    digest = hashlib.sha256()
    for name in classes:
        digest.update(os.fsencode(name) + b"\0")
    for place, file in enumerate(files):
        digest.update(os.fsencode(file.name) + b"\0" + str(file.size).encode() + b"\0")
        with suppress(PermissionError):  # it will be counted as an image that cannot be decoded
            if whole:
                digest.update(_hash_whole(hashlib.sha256(), file.path).encode())
            elif place % every == 0:
                digest.update(b"".join(_pieces(file)))
    return digest.hexdigest()[:DIGITS]


def _hash_whole(digest: hashlib._Hash, path: str, digits: int = DIGITS) -> str:
    with open(path, "rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()[:digits]


def _pieces(file: Listed) -> Iterator[bytes]:
    """Pieces of a file, spread evenly, its first and last among them: the last of a parquet file is its footer."""
    last = max(0, file.size - PIECE)
    with open(file.path, "rb") as stream:
        for place in sorted({last * piece // (SAMPLED_PIECES - 1) for piece in range(SAMPLED_PIECES)}):
            stream.seek(place)
            yield stream.read(PIECE)


def _remembered(place: Path, files: Sequence[Listed], find: Callable[[], str]) -> str:
    """Return what was noted of this place, where no file of it has changed since; else what `find` returns."""
    if sum(file.size for file in files) < NOTED_BYTES and len(files) < WHOLE_FILES:
        return find()
    stamp = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        stamp.update(os.fsencode(file.name) + struct.pack("3qQ", file.size, *file.stamp))
    settled = time.time_ns() - max((file.changed_ns for file in files), default=0) > SETTLED_NS
    key = hashlib.sha256(os.fsencode(place.resolve())).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    note = folder / "distill" / "contents" / f"{key[:32]}.json"
    with suppress(OSError, ValueError, TypeError, KeyError, DistillError):
        noted = read_json(note)
        if noted is not None and noted["stamp"] == stamp.hexdigest():
            return str(noted["found"])
    found = find()
    if settled:
        with suppress(OSError, DistillError):  # a home that cannot be written to costs the next start some time
            write_json(note, {"stamp": stamp.hexdigest(), "found": found})
    return found


def _printable(text: str) -> str:
    """`text` for a JSON file, whatever bytes file names consist of."""
    return text.encode("utf-8", "backslashreplace").decode()
