"""Unfinished work on disk (a block, the fine-tuning): weights, optimizer state and counters in one safetensors file,
whole or not at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill.files import write_bytes

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

    def __init__(self, run_dir: Path, *, generation: int) -> None:
        self._folder = run_dir / "checkpoints"
        self._generation = generation

    def file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint in the place of the earlier one of that name."""
        facts = {
            "name": checkpoint.name,
            "step": checkpoint.step,
            "progress": checkpoint.progress,
            "generation": self._generation,
        }
        write_bytes(self.file(checkpoint.name), save(checkpoint.tensors, {"checkpoint": json.dumps(facts)}))

    def load(self, name: str) -> Checkpoint | None:
        """Return the checkpoint of that name, or None where there is none that can be read."""
        path = self.file(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["checkpoint"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            log.warning("checkpoint %s cannot be read (%s); it starts again", path.name, error)
            return None
        return Checkpoint.of(facts["name"], facts["step"], tensors, facts["progress"])

    def remove(self, name: str) -> None:
        """Forget a checkpoint: what it was for is done."""
        self.file(name).unlink(missing_ok=True)


def block_name(block: int) -> str:
    """Return the checkpoint name of a block."""
    return f"{block:02d}"


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU in the plain memory format that safetensors wants; values unchanged."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
