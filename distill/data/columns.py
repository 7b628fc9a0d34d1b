"""Which columns of a table hold the images and the labels, and what the classes are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import ConfigError, one_of

USUAL_IMAGES = ("image", "img")
USUAL_LABELS = ("label", "labels")


@dataclass(frozen=True)
class Columns:
    """The two columns by name, and the class names in the order of their labels."""

    image: str
    label: str
    classes: tuple[str, ...]


def find(table: Any, *, image_column: str | None, label_column: str | None) -> Columns:
    """Return the columns of a datasets.Dataset, by the given names or else by their types.

    Images: the feature Image, or a struct of bytes and path. Labels: ClassLabel, or else whole numbers, whose classes
    are then called "0", "1", ... Raises ConfigError on data.image_column or data.label_column.
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
    values = torch.tensor(column.to_pylist(), dtype=torch.int64)
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if low < 0 or high >= len(columns.classes):
        allowed = f"labels from 0 to {len(columns.classes) - 1}, as the training split has; found {low} to {high}"
        raise ConfigError("data.label_column", columns.label, allowed)
    return values


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
    highest = max((value for value in table.data.column(label).to_pylist() if value is not None), default=-1)
    return tuple(str(number) for number in range(highest + 1))


def _is_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and "path" in feature
    return type(feature).__name__ == "Image"


def _is_class_label(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _is_number(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint")) and not _is_class_label(feature)
