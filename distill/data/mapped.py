"""What worker processes map instead of getting a copy: files in memory without a name, and lists of names in them."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np


class MemoryFile:
    """An open file in memory. Until it is closed, other processes of the same user can map it by its `path`."""

    def __init__(self) -> None:
        self.handle = os.memfd_create("distill-data")
        self.path = f"/proc/{os.getpid()}/fd/{self.handle}"

    def close(self) -> None:
        """Let go of it: its memory is freed when nobody has it mapped any more."""
        os.close(self.handle)


class FileNames:
    """The names of a set's files. A million of them as strings would cost each worker a second and 150 MB."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        file = MemoryFile()
        weakref.finalize(self, file.close)
        with open(file.path, "wb") as stream:
            stream.write(ends.tobytes())
            stream.writelines(encoded)
        self.__setstate__({"_path": file.path, "_count": len(encoded)})

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_count": self._count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path: str = state["_path"]
        self._count: int = state["_count"]
        with open(self._path, "rb") as stream:
            self._bytes = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        self._ends = np.frombuffer(self._bytes, dtype=np.int64, count=self._count + 1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> str:
        start, stop = (self._ends.nbytes + int(end) for end in self._ends[row : row + 2])
        return os.fsdecode(self._bytes[start:stop])
