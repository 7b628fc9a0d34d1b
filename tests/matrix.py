"""Many cases of one behaviour: the first shows it wherever tests run, the others where everything does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def matrix(cases: Iterable[Any]) -> list[Any]:
    """Return the cases for parametrize(), all but the first marked `matrix`; a tuple has one value for each name."""
    first, *others = cases
    return [first, *(pytest.param(*_values(case), marks=pytest.mark.matrix) for case in others)]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
