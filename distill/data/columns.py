"""Which columns of a table hold the images and the labels, and what the classes are called."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import ConfigError, one_of

USUAL_IMAGES = ("image", "img")
USUAL_LABELS = ("label", "labels")
MOST_CLASSES = 1_000_000  # larger numbers are something else, such as an image's own
SHOWN = 5  # of the classes in a warning

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """The two columns by name, and the class names in the order of their labels."""

    image: str
    label: str
    classes: tuple[str, ...]


def find(table: Any, *, image_column: str | None, label_column: str | None) -> Columns:
    """Return the columns of a datasets.Dataset, by the given names or else by their types.

    Images: the feature Image, a struct with bytes, or bytes. Labels: ClassLabel, or else whole numbers or truth values,
    whose classes are then called "0", "1", ... Raises ConfigError on data.image_column or data.label_column.
    """
    features = table.features
    images = [name for name, feature in features.items() if _is_image(feature)]
    class_labels = [name for name, feature in features.items() if _is_class_label(feature)]
    numbers = [name for name, feature in features.items() if _is_number(feature)]
    image = _choose("image_column", image_column, images, list(features), USUAL_IMAGES)
    candidates = class_labels + numbers if label_column is not None else class_labels or numbers
    label = _choose("label_column", label_column, candidates, list(features), USUAL_LABELS)
    return Columns(image, label, _classes(table, label))


def labels(table: Any, columns: Columns) -> Tensor:
    """Return the labels as int64 (N,); raise ConfigError where one is missing or is no class."""
    column = table.data.column(columns.label)
    if column.null_count:
        raise ConfigError("data.label_column", columns.label, f"a label in every row; {column.null_count} have none")
    low, high = _range(column)
    if low < 0 or high >= len(columns.classes):
        allowed = f"labels from 0 to {len(columns.classes) - 1}, as the training split has; found {low} to {high}"
        raise ConfigError("data.label_column", columns.label, allowed)
    return torch.tensor(column.to_pylist(), dtype=torch.int64)


def warn_of_empty(values: Tensor, columns: Columns) -> None:
    """Say which classes have no training image: labels that begin at 1 or leave numbers out make some."""
    counts = torch.bincount(values, minlength=len(columns.classes))
    empty = [columns.classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if empty:
        more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
        log.warning("no training images of the classes %s%s of %s", ", ".join(empty[:SHOWN]), more, columns.label)


def require_same(table: Any, columns: Columns) -> None:
    """Raise ConfigError unless the test table has the training table's columns and, where they have names, classes."""
    for setting, name in (("image_column", columns.image), ("label_column", columns.label)):
        if name not in table.features:
            allowed = f"a column of the training and of the test split, which has {', '.join(table.features)}"
            raise ConfigError(f"data.{setting}", name, allowed)
    label = table.features[columns.label]
    if _is_class_label(label) and tuple(label.names) != columns.classes:
        allowed = "the same class names in the training and the test split"
        raise ConfigError("data.label_column", columns.label, allowed)


def _choose(setting: str, given: str | None, candidates: list[str], names: list[str], usual: tuple[str, ...]) -> str:
    what = "images" if setting == "image_column" else "labels"
    if given is not None:
        if given not in names:
            raise ConfigError(f"data.{setting}", given, one_of(names, given))
        if given not in candidates:
            raise ConfigError(
                f"data.{setting}", given, f"a column of {what}; there are {', '.join(candidates) or 'none'}"
            )
        return given
    likely = [name for name in usual if name in candidates] or (candidates if len(candidates) == 1 else [])
    if not likely:
        allowed = f"the column of {what}, one of {', '.join(candidates or names)}"
        raise ConfigError(f"data.{setting}", given, allowed)
    return likely[0]


def _classes(table: Any, label: str) -> tuple[str, ...]:
    if _is_class_label(table.features[label]):
        return tuple(table.features[label].names)
    highest = _range(table.data.column(label))[1]
    if highest >= MOST_CLASSES:
        raise ConfigError("data.label_column", label, f"numbers of classes, below {MOST_CLASSES}; found {highest}")
    return tuple(str(number) for number in range(highest + 1))


def _range(column: Any) -> tuple[int, int]:
    """Return the lowest and the highest of whole numbers or truth values; of none, those of an empty range."""
    import pyarrow.compute

    ends = pyarrow.compute.min_max(column).as_py()
    return (0, -1) if ends["min"] is None else (int(ends["min"]), int(ends["max"]))


def _is_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _is_class_label(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _is_number(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool")) and not _is_class_label(feature)
