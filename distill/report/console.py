"""Where tables are printed: as wide as the terminal, and as wide as most where there is none."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDTH = 100  # columns in a pipe or a file


def console() -> Console:
    """Return standard output for tables; COLUMNS, where it is set, goes before all."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else WIDTH, highlight=False)
