"""What is logged before the run directory, and with it the place for logs, is known: kept, and logged then."""

from __future__ import annotations

import logging


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
