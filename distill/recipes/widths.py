"""How wide a narrower layer is: a share of its width, in steps that kernels are fast at."""

from __future__ import annotations


def aligned(width: int, ratio: float, align: int) -> int:
    """Return the multiple of `align` nearest to ratio * width: at least `align`, and never more than `width`, which a
    ratio of one keeps whatever the step."""
    if ratio >= 1:
        return width
    return min(width, max(align, align * int(ratio * width / align + 0.5)))
