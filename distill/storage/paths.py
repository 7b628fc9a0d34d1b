"""Paths as users write them. Knows nothing else of the package."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(text: str) -> Path:
    """Return the path with a leading ~ or ~user replaced; where there is no such home, it is a name like others."""
    return Path(os.path.expanduser(text))
