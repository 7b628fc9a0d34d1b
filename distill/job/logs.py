"""Where a rank logs to; and what is logged before the run directory, and with it that place, is known."""

from __future__ import annotations

import logging

from rich.console import Console

from distill.job.context import Context
from distill.storage.files import open_to_add


class HeldBack(logging.Handler):
    """Keeps the package's records from now on, until they are handed on to the handlers that there are then."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []
        self._logger = logging.getLogger("distill")
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if self._logger.handlers == [self]:  # with others there, they have it
            self._records.append(record)

    def hand_on(self) -> None:
        """Log what was kept, by what handles records now (standard error, if nothing does); keep nothing any more."""
        self._logger.removeHandler(self)
        for record in self._records:
            self._logger.handle(record)
        self._records.clear()


def log_to(context: Context) -> None:
    """Every rank logs to its own file; rank 0 also to standard output, without the decoration."""
    root = logging.getLogger("distill")
    root.setLevel(logging.INFO)
    root.propagate = False
    path = context.run.path / "logs" / f"rank{context.rank}.log"
    open_to_add(path).close()  # an error in our words, where it cannot be written
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter(f"%(asctime)s [rank {context.rank}] %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    if context.rank == 0:
        root.addHandler(_ConsoleHandler(context.console))


class _ConsoleHandler(logging.Handler):
    """Log lines above the live display, where there is one; errors are told on standard error instead."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.addFilter(lambda record: record.levelno < logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)
