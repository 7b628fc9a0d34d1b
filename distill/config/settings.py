"""What a setting is: a dataclass field with its explanation; and the checks of numbers that sections share."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from distill.errors import ConfigError


def setting(default: Any, explanation: str) -> Any:
    """A dataclass field with its explanation, which the configuration reference prints."""
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": explanation})
    return field(default=default, metadata={"help": explanation})


def at_least(section: str, owner: object, **minimums: float) -> None:
    for name, minimum in minimums.items():
        value = getattr(owner, name)
        if value is not None and not minimum <= value < math.inf:  # also refuses nan, which compares as False
            raise ConfigError(f"{section}.{name}", value, f"a number >= {minimum}")


def between(section: str, owner: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not low <= value <= high:
            raise ConfigError(f"{section}.{name}", value, f"a number from {low} to {high}")
