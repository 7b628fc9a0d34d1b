"""How wide a narrower layer is: in steps that kernels are fast at."""

from __future__ import annotations


def aligned(wanted: float, full: int, align: int) -> int:
    """Return the multiple of `align` nearest to the `wanted` width, at least one; `full`, which need not be a multiple,
    where that is less, or all of it is wanted."""
    return full if wanted >= full else min(full, max(align, align * int(wanted / align + 0.5)))
