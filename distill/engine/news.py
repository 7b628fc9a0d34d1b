"""What a rank that runs the teacher for others hears of their units."""

from __future__ import annotations

import queue

from distill.distributed.store import Control
from distill.engine.announcements import Announcement, Announcements
from distill.engine.rebalance.moves import Move
from distill.planning.plan import Plan


class News:
    """Which blocks of other ranks that this rank runs the teacher for have finished, or gone to ranks that it does not
    run the teacher for, so that it stops doing so."""

    def __init__(self, control: Control, plan: Plan) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._rank = control.rank
        self._announcements = Announcements(
            control, units=plan.taught_elsewhere(control.rank), heard=self._heard, moved=self._moved
        )

    def finished_elsewhere(self) -> list[int]:
        """Return the blocks heard of since the last call; raises what the watching thread met."""
        if self._announcements.error is not None:
            raise self._announcements.error
        news = []
        while not self._queue.empty():
            news.append(self._queue.get())
        return news

    def close(self) -> None:
        self._announcements.close()

    def _heard(self, block: int, _: Announcement) -> None:
        self._queue.put(block)

    def _moved(self, move: Move) -> None:
        if move.target != self._rank:
            self._queue.put(move.unit)
