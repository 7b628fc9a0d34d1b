"""What the tests of feeds and schedules share: feeds walked to their ends."""

from __future__ import annotations

from distill.planning.schedule import Address, Checks, Feed

NEVER = Checks()


def walk(feed: Feed) -> list[Address]:
    """Every address that the feed asks for, served one by one."""
    seen = []
    while feed.cursor is not None:
        seen.append(feed.cursor)
        feed.advance()
    return seen
