"""From a file to what is in it, tensors in dictionaries. Looks at the content, not at the name, and never runs it."""

from __future__ import annotations

import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distill.errors import ConfigError
from distill.storage.paths import expanded
from distill.teachers import inert

KINDS = "safetensors, or written by torch.save"
SAVE = "torch.save(model.state_dict(), FILE)"
UNPACKED = 10  # times the file's own size: torch.save packs nothing, and no weights shrink like that
GIB = 2**30

# First bytes, lower case, of what people take for a checkpoint, and what to do about it.
_NOT_CHECKPOINTS = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself: git lfs pull"),
    (b"<!doctype", "it is a web page: the download got a page instead of the file"),
    (b"<html", "it is a web page: the download got a page instead of the file"),
    (b"<?xml", "it is an XML text, such as a server's refusal of a download"),
    (b"\x1f\x8b", "it is packed by gzip: gunzip it first"),
    (b"\x89hdf", "it is an HDF5 file, as Keras writes them; this reads PyTorch's weights"),
)
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.\w+$")


def read(weights: str) -> Any:
    """Return what the file `weights` holds, on the CPU; inert.Inert stands for whatever is neither data nor tensor.

    Raises ConfigError on teacher.weights where there is no such file, or where it is no checkpoint.
    """
    try:
        path = expanded(weights)
        reason = _why_no_file(path) or _why_no_checkpoint(path)
    except (OSError, RuntimeError) as error:  # no permission; no such user
        reason = f"a file that can be read ({error})"
    if reason:
        raise ConfigError("teacher.weights", weights, reason)
    try:
        if _is_safetensors(path):
            return load_file(path)
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes whose source is not here, which are not made anyway
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=inert)
    except Exception as error:  # a damaged file may raise anything
        raise ConfigError("teacher.weights", weights, f"a readable file of tensors ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    if "magic number" in first:
        return f"it is neither {KINDS}"
    return f"damaged, or cut short: {type(error).__name__}: {first}"


def _why_no_file(path: Path) -> str:
    """Return what is expected in place of a path that is not the file of a whole network's weights, else ""."""
    if path.is_dir():
        return f"a file ({KINDS}), not a folder{_in_folder(path)}"
    if not path.exists():
        return f"a file that exists ({KINDS})"
    if not path.is_file():
        return f"a regular file ({KINDS})"
    shard = _SHARD.search(path.name)
    if shard and int(shard[2]) > 1:
        return f"one file with all weights; this is part {int(shard[1])} of {int(shard[2])}: load them all, then {SAVE}"
    return ""


def _in_folder(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if ".metadata" in names:
        return (
            " of torch.distributed.checkpoint; to make one of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        )
    files = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".th"))]
    return f"; in it: {', '.join(files[:5])}{', ...' if files[5:] else ''}" if files else ""


def _why_no_checkpoint(path: Path) -> str:
    """Return what is expected in place of a file whose first bytes or table of contents tell that it is something else,
    else ""."""
    size = path.stat().st_size
    if not size:
        return "a file of weights; it is empty"
    with path.open("rb") as file:
        head = file.read(512)
    for beginning, what in _NOT_CHECKPOINTS:
        if head.lstrip().lower().startswith(beginning):
            return f"a file of weights ({KINDS}); {what}"
    if path.suffix == ".json":
        return f"a file of weights ({KINDS}); it is a JSON text, such as the index of several files: load them, {SAVE}"
    if head[257:262] == b"ustar" and tarfile.is_tarfile(path):
        return f"a file of weights ({KINDS}); it is a tar archive: unpack it, and give the file in it"
    return _why_no_archive(path, size) if head.startswith(b"PK") else ""


def _why_no_archive(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        return "a whole file of weights; its end is missing: copy or download it again"
    names = {member.filename.partition("/")[2] for member in members}
    unpacked = sum(member.file_size for member in members)
    if unpacked > UNPACKED * size:
        return (
            f"a file of weights; its table of contents tells of {unpacked / GIB:.1f} GiB in a file of "
            f"{size / GIB:.3f} GiB, which torch.save writes for no weights"
        )
    if "constants.pkl" in names:
        return f"a state_dict; it is a TorchScript program: {SAVE.replace('model', 'torch.jit.load(IT)')} makes one"
    if "data.pkl" not in names:
        return f"a file of weights ({KINDS}); it is a zip archive of something else"
    return ""


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: eight bytes of length, then a header in JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"
