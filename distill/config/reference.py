"""Every setting with its type, default and explanation, from which docs/configuration.md is generated."""

from __future__ import annotations

import json
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_type_hints

from omegaconf import MISSING

from distill.config.schema import JobConfig


def settings(schema: type = JobConfig, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return (dotted path, type, default, explanation) of every setting, in the schema's order."""
    rows = []
    hints = get_type_hints(schema)
    for entry in fields(schema):
        path, kind = f"{prefix}{entry.name}", hints[entry.name]
        if is_dataclass(kind):
            rows += settings(cast(type, kind), f"{path}.")
            continue
        default = entry.default_factory() if entry.default_factory is not NO_DEFAULT else entry.default
        shown = default.name if isinstance(default, Enum) else json.dumps(default)
        rows.append((path, _type_name(kind), "from its group" if default == MISSING else shown, entry.metadata["help"]))
    return rows


def setting_kinds() -> dict[str, str]:
    """Return the type of every setting, in words, by its dotted path."""
    return {path: kind for path, kind, _, _ in settings()}


def _type_name(kind: Any) -> str:
    if isinstance(kind, UnionType):
        names = ["null" if one is NoneType else _type_name(one) for one in get_args(kind)]
        return " or ".join(names) if " or " in names[0] else str(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(member.name for member in kind)
    return (
        kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind).replace("typing.", "")
    )
