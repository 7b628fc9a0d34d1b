"""Files that are written whole or not at all. Knows nothing of the job."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from distill.errors import DistillError


class DiskError(DistillError):
    """A file could not be written; whatever stood there before is untouched."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one in the same folder, flushed to disk and renamed into place.

    Raises DiskError (for example on a full disk), with the temporary file removed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.parent / f".{path.name}.{uuid.uuid4().hex}"
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask: others may read
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise DiskError(f"cannot write {path}: {error.strerror or error}; free some space or set run.dir") from error


def write_text(path: Path, content: str) -> None:
    """write_bytes() for text, as UTF-8; what is left of file names in other encodings is escaped."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """write_bytes() for a JSON value, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value of a file, or None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None
