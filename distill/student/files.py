"""The delivered student: student.safetensors, and a small JSON that rebuilds its module without the teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from distill.errors import ConfigError, DistillError
from distill.extensions import named
from distill.recipes import RECIPES, Recipe
from distill.recipes.activations import install
from distill.storage.aliases import load_state
from distill.storage.checkpoint import contiguous
from distill.storage.files import DamagedFileError, read_bytes, read_json, write_bytes, write_json
from distill.storage.packed import load_packed
from distill.teachers import build_architecture

FORMAT = 2
PACKED = "student.packed.safetensors"  # the same weights without the zeros


@dataclass(frozen=True, kw_only=True)
class StudentCard:
    """Everything but the weights. `architecture` holds build_architecture()'s arguments, `blocks` for every block that
    was changed its recipe's name and options, and what it changed; all JSON values.

    A picture becomes an input by: turned as its EXIF orientation says, if `exif_orientation`; its colours as `colours`;
    shorter side resized to `resize_shorter_side` pixels by `resize_filter` (both sides, where the `aspect` is
    squashed); `crop` to image_size x image_size; values in `value_range`; minus `mean`, divided by `std`, one a
    channel; as `input_layout`. That is how the test images were
    prepared. Outputs are logits, one a class.
    """

    architecture: Mapping[str, Any]
    blocks: Sequence[Mapping[str, Any]]
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
    # The card last: it has the hash of the weights, so that a break in between leaves a pair that is refused.
    write_bytes(path, content)
    write_json(folder / "student.json", asdict(card) | {"weights_sha256": hashlib.sha256(content).hexdigest()})
    return path


def load_student(
    path: str | Path,
    *,
    factory: Callable[..., nn.Module] | None = None,
    recipes: Mapping[str, type[Recipe]] | None = None,
) -> nn.Module:
    """Return a delivered student in eval mode, on the CPU.

    `path` is a run directory, its student.safetensors or its student.json; or its student.packed.safetensors, whose
    weights are taken then. Nothing that the files name is imported but the registries of architectures: a student of
    your own network needs its `factory`, which is called with num_classes and teacher.options, and one of a recipe from
    outside the class in `recipes`, by the name that it had. Raises DistillError where either file is missing, damaged,
    of another format, or needs what is not given.
    """
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    card_path = folder / "student.json"
    weights = folder / (PACKED if given.name == PACKED else "student.safetensors")
    for file in (card_path, weights):
        if not file.exists():
            raise DistillError(f"no student at {given}: {file.name} is missing; finished runs have both files")
    try:
        card = read_json(card_path)
        content = load_packed(weights) if weights.name == PACKED else read_bytes(weights)
    except DamagedFileError as damage:
        raise DistillError(f"{damage}; copy student.json and {weights.name} again") from damage
    if card.get("format") not in (1, FORMAT):
        raise DistillError(f"{card_path}: format {card.get('format')!r}, but this version reads formats 1 and {FORMAT}")
    if isinstance(content, bytes) and hashlib.sha256(content).hexdigest() != card.get("weights_sha256"):
        raise DistillError(f"{weights}: damaged, or not the weights that {card_path.name} is about; copy both again")
    student = _build(card, card_path, factory, RECIPES | dict(recipes or {}))
    try:
        load_state(student, load(content) if isinstance(content, bytes) else content)
    except (RuntimeError, SafetensorError) as error:
        raise DistillError(f"{weights}: not the weights of {card_path.name}'s network ({error})") from error
    return student.eval()


def _build(
    card: Mapping[str, Any], path: Path, factory: Callable[..., nn.Module] | None, recipes: Mapping[str, type[Recipe]]
) -> nn.Module:
    """Return the network that a card describes, its weights not yet meaningful."""
    try:
        student = _architecture(card["architecture"], path, factory)
        for block in _blocks(card):
            name = block["recipe"]
            if name not in recipes and ":" not in name:  # what is installed by its name is not the file's to choose
                recipes = {**recipes, name: named("student.recipe", name, recipes, "distill.recipes")}
            if name not in recipes:
                raise DistillError(f"{path}: made by the recipe {name!r}, whose class load_student(recipes=...) takes")
            install(recipes[name](**block["options"]), student, block["changes"])
    except ConfigError as error:  # its words name settings of the run that made the student
        raise DistillError(f"{path}: the network that it describes cannot be built here: {error}") from error
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DistillError(f"{path}: no card of a student that this version can build ({reason})") from error
    return student


def _blocks(card: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return what recipes have changed; format 1 had one recipe, which replaced convolutions alone."""
    if card["format"] > 1:
        return card["blocks"]  # type: ignore[no-any-return]
    recipe = card["recipe"]
    changes = {"convolutions": card["replaced"]}
    return [{"recipe": recipe["name"], "options": recipe["options"], "changes": changes}]


def _architecture(facts: Mapping[str, Any], path: Path, factory: Callable[..., nn.Module] | None) -> nn.Module:
    if facts["source"] != "factory":
        return build_architecture(**facts)
    if factory is None:
        raise DistillError(
            f"{path}: the student of a network that {facts['factory']} makes, and no file says what runs here: "
            "load_student(path, factory=...) takes that function"
        )
    network = factory(num_classes=facts["num_classes"], **facts.get("options", {}))
    if not isinstance(network, nn.Module):
        raise DistillError(f"{path}: factory has returned a {type(network).__name__}, no torch.nn.Module")
    return network
