"""Where recorded activations lie: in memory that the ranks of a host share, or in a file that later attempts find.

The first rank of a host makes the place, and every rank of the host maps its `path`.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from distill.errors import ConfigError
from distill.machine.host import available_memory
from distill.storage.files import DamagedFileError, file_digest, read_json, write_json

log = logging.getLogger(__name__)

GIB = 2**30


class Place(Protocol):
    """Bytes at `path`; `complete` where an earlier attempt has filled them."""

    path: Path
    complete: bool

    def check(self) -> None:
        """Read all that an earlier attempt has filled; where it is damaged, say so, and the place is not complete."""

    def reserve(self, nbytes: int) -> None:
        """Make room for so many bytes; raises ConfigError where they are not to be had."""

    def finish(self) -> None:
        """Say that all of it has been written, and that every rank of the host has mapped it."""

    def discard(self) -> None:
        """Say that it is not needed after all."""


class Memory:
    """Memory without a name, which goes when the last rank that has mapped it ends, however that comes about."""

    complete = False

    def __init__(self) -> None:
        self._handle = os.memfd_create("distill-cache")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._handle}")

    def check(self) -> None:
        pass

    def reserve(self, nbytes: int) -> None:
        available = available_memory()
        if nbytes > available:
            allowed = f"disk, or less to record: it takes {nbytes / GIB:.2f} GiB of the {available / GIB:.2f} GiB free"
            raise ConfigError("teacher.cache", "ram", allowed)
        os.ftruncate(self._handle, nbytes)

    def finish(self) -> None:
        os.close(self._handle)

    def discard(self) -> None:
        os.close(self._handle)


class File:
    """FOLDER/KEY.rows, which is there whole or not at all; until it is complete it has its writer's name in its own.
    KEY.json beside it has its checksum."""

    def __init__(self, folder: Path, *, key: str, writer: str) -> None:
        """Find the file. Raises ConfigError on cache.dir where there is none and none can be written."""
        self._folder = folder
        self._final, self._scratch = folder / f"{key}.rows", folder / f"{key}.{writer}.unfinished"
        self._record = folder / f"{key}.json"
        self.complete = self._final.exists()
        self.path = self._final if self.complete else self._scratch

    def check(self) -> None:
        if not self.complete:
            return
        try:
            recorded = read_json(self._record)
            if recorded is None:
                raise DamagedFileError(self._record, "missing")
            if file_digest(self._final) != recorded["sha256"]:
                raise DamagedFileError(self._final, "damaged: it is not what was recorded")
        except DamagedFileError as damage:
            if damage.path.is_dir():
                raise
            log.warning("cache: %s; it is recorded again", damage)
            self.complete, self.path = False, self._scratch

    def reserve(self, nbytes: int) -> None:
        """Throws away what a writer of the same name has left unfinished."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._scratch.unlink(missing_ok=True)
            with self._scratch.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)  # a disk that fills up later would kill the writers
        except OSError as error:
            self.discard()
            allowed = f"a folder with {nbytes / GIB:.2f} GiB free that can be written to ({error.strerror or error})"
            raise ConfigError("cache.dir", str(self._folder), allowed) from error

    def finish(self) -> None:
        with self._scratch.open("rb") as file:
            os.fsync(file.fileno())  # also what other ranks have written through their mappings
        write_json(self._record, {"sha256": file_digest(self._scratch)})
        os.replace(self._scratch, self._final)

    def discard(self) -> None:
        with suppress(OSError):
            self._scratch.unlink(missing_ok=True)
