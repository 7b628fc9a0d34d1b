"""Log records from before there is a place for them."""

import logging
from collections.abc import Iterator

import pytest

from distill.job.logs import HeldBack


class Seen(logging.Handler):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def package() -> Iterator[logging.Logger]:
    logger = logging.getLogger("distill")
    level = logger.level
    yield logger
    logger.setLevel(level)


def test_what_was_logged_before_is_logged_once_there_is_a_place(package: logging.Logger) -> None:
    held, later = HeldBack(), Seen()
    logging.getLogger("distill.data.folder").warning("no images in %s", "a")
    logging.getLogger("distill.job.materials").info("weights")
    package.addHandler(later)
    held.hand_on()
    package.info("after")
    held.hand_on()
    package.removeHandler(later)
    assert later.messages == ["no images in a", "weights", "after"]
