"""What a user may spend on the student: a share of the teacher's, or an amount with its unit. Knows no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from distill.errors import ConfigError

_NUMBER = re.compile(r"(?P<number>([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")
_SIZES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_FLOPS = {"FLOPs": 1.0, "kFLOPs": 1e3, "MFLOPs": 1e6, "GFLOPs": 1e9, "TFLOPs": 1e12}

# By the name of a budget the units that amounts of it have, and what each is in the unit that it is reckoned in.
UNITS: dict[str, dict[str, float]] = {
    "params": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "flops": _FLOPS,
    "bytes": _SIZES,
    "memory": _SIZES,
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
}
EXAMPLES = {"params": "100k", "flops": "20MFLOPs", "bytes": "500kB", "memory": "3MiB", "latency": "3ms"}


@dataclass(frozen=True)
class Budget:
    """At most so much of what `name` says: `amount`, or a `share` of what the teacher has of it."""

    name: str
    share: float | None = None
    amount: float | None = None

    def limit(self, teacher: float) -> float:
        """Return the most that a student may have where its teacher has so much."""
        if self.amount is not None:
            return self.amount
        assert self.share is not None
        return self.share * teacher


def parse(name: str, value: object) -> Budget:
    """Return what a user has written for a budget: a number up to 1 is a share, any other needs its unit (parameters
    have none but k, M or G). Raises ConfigError."""
    setting = f"search.budget.{name}"
    allowed = f"a share of the teacher's, such as 0.5, or an amount with its unit, such as {EXAMPLES[name]}"
    units = UNITS[name]
    written = value if isinstance(value, str) else "" if isinstance(value, bool) else str(value)
    found = _NUMBER.fullmatch(written.strip())
    if found is None:
        raise ConfigError(setting, value, allowed)
    number = float(found["number"])
    if not 0 < number < math.inf:
        raise ConfigError(setting, value, allowed)
    if not found["unit"] and number <= 1:
        return Budget(name, share=number)
    if found["unit"] not in units:
        raise ConfigError(setting, value, f"{allowed} (one of {', '.join(unit for unit in units if unit)})")
    return Budget(name, amount=number * units[found["unit"]])


def shown(name: str, amount: float) -> str:
    """Return an amount in words, with three digits, in the largest unit of which it has at least one."""
    sizes = sorted((size, unit) for unit, size in UNITS[name].items() if "i" not in unit)
    size, unit = next((one for one in reversed(sizes) if one[0] <= amount), sizes[0])
    number = amount / size
    digits = 0 if (size == 1 and name != "latency") or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {unit}".strip()
