"""What is logged before there is a place for logs: it is logged then, and nothing twice."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from distill.job.logs import HeldBack


class Noting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("distill")
    handlers, found.handlers = found.handlers, []
    yield found
    found.handlers = handlers


def test_every_record_is_logged_once_whether_it_came_before_the_handlers_or_after(logger: logging.Logger) -> None:
    held, noting = HeldBack(), Noting()
    logger.info("before")
    logger.addHandler(noting)
    logger.info("after")
    held.hand_on()
    logger.info("at last")
    assert sorted(noting.told) == ["after", "at last", "before"]
