"""What is tried on every block where a user names no candidates: a recipe that finds nothing in a block to change, or
nothing that it makes cheaper, has no candidate there."""

from __future__ import annotations

from typing import Any

# In the steps that make a difference to whole networks of budgets from .2 to .7.
DEFAULT: tuple[dict[str, Any], ...] = (
    {"recipe": "skip"},
    *({"recipe": "separable", "rank": rank} for rank in (1, 2, 3, 4)),
    *({"recipe": "lowrank", "form": "spatial", "ratio": ratio} for ratio in (0.15, 0.25, 0.375, 0.5, 0.75)),
    *({"recipe": "lowrank", "form": "channel", "ratio": ratio} for ratio in (0.25, 0.5, 0.75)),
    *({"recipe": "thin", "ratio": ratio} for ratio in (0.25, 0.375, 0.5, 0.75)),
    *({"recipe": "halved", "ratio": ratio} for ratio in (0.25, 0.5)),
    {"recipe": "one_conv"},
)
