"""Where a run's lines and all tables are printed: as wide as the terminal, and as wide as most where there is none."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from rich.console import Console

WIDTH = 100  # columns in a pipe or a file


class PatientConsole(Console):
    """Goes on in silence where its reader has left (`| head`): what a job has paid for is not thrown away for that."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):  # the same reader may have had both
            sys.stderr.write("distill: standard output has been closed; what was begun goes on without it\n")


def console() -> Console:
    """Return standard output; COLUMNS, where it is set, goes before all."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return PatientConsole(width=None if known else WIDTH, highlight=False)
