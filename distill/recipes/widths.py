"""How wide a narrower layer is: in steps that kernels are fast at."""

from __future__ import annotations


def aligned(width: float, full: int, align: int) -> int:
    """Return the multiple of `align` nearest to the wanted `width`: at least `align`, and at most `full`, which need
    not be a multiple."""
    return min(full, max(align, align * int(width / align + 0.5)))
