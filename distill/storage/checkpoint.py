"""Unfinished work on disk (a block, the fine-tuning): weights, optimizer state and counters in one safetensors file,
whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distill.storage.aliases import each_once, memory_of
from distill.storage.files import DamagedFileError, read_bytes, sealed, unsealed, write_bytes

log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """State of `name` (a block's two-digit index, "finetune", ...) after `step` steps. Tensors are on the CPU;
    `progress` holds plain JSON numbers."""

    name: str
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors in one mapping, as safetensors wants them."""
        parts = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        return contiguous(parts | {f"optimizer/{name}": tensor for name, tensor in self.optimizer.items()})

    @staticmethod
    def of(name: str, step: int, tensors: Mapping[str, Tensor], progress: dict[str, Any]) -> Checkpoint:
        """Return the checkpoint with these `tensors`; see there."""
        return Checkpoint(name, step, _part(tensors, "weights/"), _part(tensors, "optimizer/"), progress)


class CheckpointFolder:
    """checkpoints/<name>.safetensors of one run directory; a block's owner writes, whoever owns it next reads."""

    def __init__(self, run_dir: Path, *, generation: int, origin: str = "") -> None:
        """`origin` says what the work began with; what began with something else is not taken up."""
        self._folder = run_dir / "checkpoints"
        self._generation, self._origin = generation, origin

    def file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint in the place of the earlier one of that name."""
        tensors = checkpoint.tensors
        facts = {
            "step": checkpoint.step,
            "progress": checkpoint.progress,
            "generation": self._generation,
            "origin": self._origin,
            # safetensors has no checksum of its own
            "tensors": digest_of(tensors),
        }
        path = self.file(checkpoint.name)
        write_bytes(path, save(tensors, {"checkpoint": json.dumps(sealed(facts, path.name), allow_nan=False)}))

    def load(self, name: str) -> Checkpoint | None:
        """Return the checkpoint of that name, or None where there is none that can be believed."""
        path = self.file(name)
        if not path.exists():
            return None
        try:
            facts, tensors = _read(path)
        except DamagedFileError as damage:
            if path.is_dir():
                raise
            log.warning("checkpoint %s; it starts again", damage)
            return None
        if facts["origin"] != self._origin:
            log.warning("checkpoint %s: of another run, or of another teacher; it starts again", path)
            return None
        return Checkpoint.of(name, facts["step"], tensors, facts["progress"])

    def remove(self, name: str) -> None:
        """Forget a checkpoint: what it was for is done."""
        self.file(name).unlink(missing_ok=True)


def unit_name(unit: int) -> str:
    """Return the checkpoint name of a unit."""
    return f"{unit:02d}"


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU in the plain memory format that safetensors wants, without second names of the same
    tensor; values unchanged. Inverse: load_state()."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in each_once(tensors).items()}
    memories: set[int] = set()
    for name, tensor in plain.items():
        memory = memory_of(tensor)
        if memory in memories:  # a view of another one, such as a slice of a larger table
            plain[name] = tensor.clone()
        memories.add(memory)
    return plain


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a checkpoint's file says and its tensors. Raises DamagedFileError."""
    # read once: what the header says and the tensors are of one file, even if another is put in its place meanwhile
    content = read_bytes(path)
    try:
        length = int.from_bytes(content[:8], "little")  # of the header, which begins a safetensors file
        header = json.loads(content[8 : 8 + length])
        facts, tensors = unsealed(header["__metadata__"]["checkpoint"], path.name), load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedFileError(path, f"damaged ({error})") from error
    if facts["tensors"] != digest_of(tensors):
        raise DamagedFileError(path, "damaged: its tensors are not those that were written")
    return facts, tensors


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
