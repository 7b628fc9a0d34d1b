"""Widths are in steps."""

from __future__ import annotations

import pytest

from distill.recipes.widths import aligned


@pytest.mark.parametrize(
    ("wanted", "full", "align", "found"),
    [
        (20, 64, 8, 24),
        (19.9, 64, 8, 16),
        (1, 64, 8, 8),
        (6.4, 64, 1, 6),
        (56, 60, 16, 60),  # the nearest multiple would be larger than all
        (3, 5, 8, 5),
        (17, 17, 8, 17),
        (63, 60, 8, 60),
    ],
)
def test_the_nearest_multiple_at_least_one_and_at_most_all(wanted: float, full: int, align: int, found: int) -> None:
    assert aligned(wanted, full, align) == found
