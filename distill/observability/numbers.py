"""How numbers are written for people: counts, seconds, short forms; what is no number is a dash."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> float | None:
    """Return a number that can be drawn; None for what is missing, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def show(value: Any, form: str = "{:,.2f}") -> str:
    """Return a number as text: "-" where it is missing, "not finite" for NaN and infinity."""
    if value is None:
        return "-"
    number = finite(value)
    return "not finite" if number is None else form.format(number)


def show_count(number: float, noun: str) -> str:
    """Return a number of things: 1 epoch, 2 epochs, 2.5 epochs, 3 batches."""
    plural = noun + ("es" if noun.endswith("tch") else "s")
    counted = int(number) if number == int(number) else number
    return f"{counted:,} {noun if number == 1 else plural}"


def show_seconds(value: Any) -> str:
    """Return seconds as a person would say them."""
    number = finite(value)
    if number is None:
        return show(value)
    for limit, form in ((0.1, f"{1000 * number:.1f} ms"), (10, f"{number:.2f} s"), (120, f"{number:.1f} s")):
        if abs(number) < limit:
            return form
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_short(value: Any, unit: str = "") -> str:
    """Return a count with three digits and its power of a thousand: 73.1 k, 1.54 G."""
    number = finite(value)
    if number is None:
        return show(value)
    power = min(4, max(0, int(math.log10(abs(number)) // 3))) if number else 0
    scaled = number / 1000**power
    digits = 0 if power == 0 and number == int(number) else max(0, 2 - int(math.log10(max(1.0, abs(scaled)))))
    return f"{scaled:.{digits}f} {('', 'k', 'M', 'G', 'T')[power]}{unit}".strip()
