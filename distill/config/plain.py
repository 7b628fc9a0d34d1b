"""From a section of the configuration to the options of what it configures, which know no configuration."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


def options_of(kind: type[T], section: object, **others: object) -> T:
    """Return the dataclass `kind` with the values of the settings that have its fields' names in `section`, choices by
    their names; `others` are the fields that a section has not, or not so."""
    names = {field.name for field in fields(kind)} - others.keys()  # type: ignore[arg-type]
    values: dict[str, Any] = {name: getattr(section, name) for name in names}
    plain = {name: value.name if isinstance(value, Enum) else value for name, value in values.items()}
    return kind(**plain, **others)
