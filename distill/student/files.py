"""The delivered student: student.safetensors, and a small JSON that rebuilds its module without the teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from distill.errors import ConfigError, DistillError
from distill.recipes import RECIPES, replace_convolutions
from distill.storage.aliases import load_state
from distill.storage.checkpoint import contiguous
from distill.storage.files import DamagedFileError, read_bytes, read_json, write_bytes, write_json
from distill.teachers import build_architecture

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class StudentCard:
    """Everything but the weights. `architecture` holds build_architecture()'s arguments, `recipe` its name and options,
    `replaced` the paths of the convolutions it replaced.

    A picture becomes an input by: turned as its EXIF orientation says, if `exif_orientation`; its colours as `colours`;
    shorter side resized to `resize_shorter_side` pixels by `resize_filter` (both sides, where the `aspect` is
    squashed); `crop` to image_size x image_size; values in `value_range`; minus `mean`, divided by `std`, one a
    channel; as `input_layout`. That is how the test images were
    prepared. Outputs are logits, one a class.
    """

    architecture: Mapping[str, Any]
    recipe: Mapping[str, Any]
    replaced: Sequence[str]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str]
    resize_shorter_side: int
    exif_orientation: bool = True
    resize_filter: str = "bilinear, antialiased (as PIL resizes)"
    aspect: str = "kept"
    crop: str = "centre"
    colours: str = "RGB"
    value_range: Sequence[float] = field(default_factory=lambda: [0.0, 1.0])
    input_layout: str = "batch, channel, height, width; float32"
    format: int = field(default=FORMAT)


def save_student(folder: Path, student: nn.Module, card: StudentCard) -> Path:
    """Write student.safetensors and student.json into `folder`; return the path of the weights."""
    path, content = folder / "student.safetensors", save(contiguous(student.state_dict()))
    write_bytes(path, content)
    write_json(folder / "student.json", asdict(card) | {"weights_sha256": hashlib.sha256(content).hexdigest()})
    return path


def load_student(path: str | Path) -> nn.Module:
    """Return a delivered student in eval mode, on the CPU.

    `path` is a run directory, its student.safetensors or its student.json. Raises DistillError where either file is
    missing, damaged or of another format.
    """
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    card_path, weights = folder / "student.json", folder / "student.safetensors"
    for file in (card_path, weights):
        if not file.exists():
            raise DistillError(f"no student at {given}: {file.name} is missing; finished runs have both files")
    try:
        card, content = read_json(card_path), read_bytes(weights)
    except DamagedFileError as damage:
        raise DistillError(f"{damage}; copy student.json and student.safetensors again") from damage
    if card.get("format") != FORMAT:
        raise DistillError(f"{card_path}: format {card.get('format')!r}, but this version reads format {FORMAT}")
    if hashlib.sha256(content).hexdigest() != card.get("weights_sha256"):
        raise DistillError(f"{weights}: damaged, or not the weights that {card_path.name} is about; copy both again")
    student = _build(card, card_path)
    try:
        load_state(student, load(content))
    except (RuntimeError, SafetensorError) as error:
        raise DistillError(f"{weights}: not the weights of {card_path.name}'s network ({error})") from error
    return student.eval()


def _build(card: Mapping[str, Any], path: Path) -> nn.Module:
    """Return the network that a card describes, its weights not yet meaningful."""
    try:
        student = build_architecture(**card["architecture"])
        recipe = RECIPES[card["recipe"]["name"]](**card["recipe"]["options"])
        replace_convolutions(student, card["replaced"], recipe)
    except ConfigError as error:  # its words name settings of the run that made the student
        raise DistillError(f"{path}: the network that it describes cannot be built here: {error}") from error
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DistillError(f"{path}: no card of a student that this version can build ({reason})") from error
    return student
