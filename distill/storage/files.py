"""Files that are written whole or not at all, and believed only as they were written. Knows nothing of the job.

A JSON object carries a checksum, of itself and its file's name, under the last key: tools read it as ever. JSON has no
NaN and no infinity: they are written as null, and `not_finite` beside says where (RFC 6901) and which; reading puts
them back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from distill.errors import DistillError

CHECKSUM, NOT_FINITE = "checksum", "not_finite"
COMMENT = "# checksum: "  # the last line of a text


class DiskError(DistillError):
    """A file could not be written; whatever stood there before is untouched."""


class DamagedFileError(DistillError):
    """A file that is not as it was written, or cannot be read at all."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one in the same folder, flushed to disk and renamed into place.

    Raises DiskError (for example on a full disk), with the temporary file removed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in the same folder: a rename is whole or nothing only within one file system
        scratch = path.parent / f".{path.name}.{uuid.uuid4().hex}"
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask: others may read
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # flushed before it is renamed: after a power cut the name might else stand for an empty file
        os.replace(scratch, path)
    except IsADirectoryError as error:
        scratch.unlink(missing_ok=True)
        raise DiskError(f"cannot write {path}: a folder is in its place; remove it") from error
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise DiskError(f"cannot write {path}: {error.strerror or error}; free some space or set run.dir") from error


def write_text(path: Path, content: str) -> None:
    """write_bytes() for text, as UTF-8; what is left of file names in other encodings is escaped."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_commented(path: Path, content: str) -> None:
    """write_text() for text in which lines that begin with # are comments; the last one is its checksum."""
    write_text(path, f"{content}{COMMENT}{_checksum(content)}\n")


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """write_bytes() for a JSON object, with a final newline."""
    write_text(path, json.dumps(sealed(value, path.name), indent=indent, allow_nan=False) + "\n")


def json_line(value: Mapping[str, Any], name: str) -> str:
    """Return a JSON object as a line of the file of that name, to which lines are added."""
    return json.dumps(sealed(value, name), allow_nan=False) + "\n"


def open_to_add(path: Path) -> TextIO:
    """Return a file open for adding lines to it. Raises DiskError."""
    try:
        return path.open("a")
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Add a json_line() to a file, flushed to disk; half a line that a crash has left before it stays alone.

    Raises DiskError.
    """
    try:
        with path.open("a+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - 1))
            torn = stream.read(1) not in (b"", b"\n")
            stream.write(b"\n" * torn + json_line(value, path.name).encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises DamagedFileError where it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedFileError(path, _unreadable(error)) from error


def read_commented(path: Path) -> str:
    """Return the text that write_commented() wrote. Raises DamagedFileError where it is another."""
    try:
        content, found, checksum = read_bytes(path).decode().rpartition(COMMENT)
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"damaged ({error})") from error
    if not found or checksum != f"{_checksum(content)}\n":
        raise DamagedFileError(path, "damaged, or edited: it is not what its checksum says")
    return content


def read_json(path: Path) -> Any:
    """Return the JSON object of a file, or None where there is no such file. Raises DamagedFileError."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFileError(path, _unreadable(error)) from error
    try:
        return unsealed(text, path.name)
    except ValueError as error:
        raise DamagedFileError(path, f"damaged ({error})") from error


def read_lines(path: Path) -> Iterator[dict[str, Any] | DamagedFileError]:
    """Yield the JSON objects of a file of json_line()s, and in the place of what is none of them why that is so.

    Nothing where there is no such file.
    """
    if not path.exists():
        return
    try:
        lines = read_bytes(path).splitlines()
    except DamagedFileError as damage:
        yield damage
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield unsealed(line, path.name)
        except ValueError as error:
            yield DamagedFileError(path, f"line {number} is damaged ({error})")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes. Raises DamagedFileError where it is missing or cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DamagedFileError(path, _unreadable(error)) from error


def sealed(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a JSON object with its checksum as one of that name, and with what JSON has no numbers for set apart."""
    plain = json.loads(json.dumps(value))  # keys are texts and tuples lists, as they will be read
    missing = {pointer: str(number) for pointer, number in _not_finite("", plain)}
    if missing:
        plain = _with_nulls(plain) | {NOT_FINITE: missing}
    return {**plain, CHECKSUM: _checksum_of(plain, name)}


def unsealed(text: str | bytes, name: str) -> dict[str, Any]:
    """Return the JSON object of that name whose sealed() form a text holds. Raises ValueError where it is none."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("not JSON of ours") from None
    if not isinstance(value, dict) or CHECKSUM not in value:
        raise ValueError("it has no checksum: it was edited, or an earlier version wrote it")
    if value.pop(CHECKSUM) != _checksum_of(value, name):
        raise ValueError("it is not what its checksum says")
    for pointer, number in value.pop(NOT_FINITE, {}).items():
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:])
        place = value
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        place[int(last) if isinstance(place, list) else last] = float(number)
    return value


def _not_finite(pointer: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the places of numbers that JSON does not know, and those numbers."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(f"{pointer}/{index}", item)
    elif isinstance(value, float) and not math.isfinite(value):
        yield pointer, value


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checksum_of(value: Mapping[str, Any], name: str) -> str:
    return _checksum(name + json.dumps(value, sort_keys=True))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unreadable(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, IsADirectoryError):
        return "a folder is in its place; remove it"
    return f"cannot be read ({error.strerror or error})"
