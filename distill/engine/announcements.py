"""Which units are done: said by whoever has finished one, over the store, and heard by whoever feeds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import NamedTuple

from distill.distributed.store import POLL_S, Control
from distill.engine.rebalance.handover import stolen
from distill.engine.rebalance.moves import Move
from distill.errors import DistillError
from distill.storage.ledger import Entry

WATCH_S = 0.1  # between two looks at what has finished elsewhere: each takes a moment from this rank's training


def announce(control: Control, entry: Entry, size: int) -> None:
    """Say to all ranks that a unit is done; its weights have `size` bytes. A rank's announcements are heard in the
    order in which it makes them."""
    # counted first, said second: whoever watches must bear a number that has no message yet
    number = control.count("done", 1) - 1
    control.set(f"done/{number}", {"entry": asdict(entry), "bytes": size})


class Announcement(NamedTuple):
    """A finished unit: its ledger entry, still without a checksum, and the size of its weights in bytes."""

    entry: Entry
    bytes: int


class Announcements:
    """Which units have been announced as finished, watched in a thread over a connection of its own: now and then
    while this rank trains, more often after hurry()."""

    def __init__(
        self,
        control: Control,
        *,
        units: Collection[int],
        heard: Callable[[int, Announcement], None],
        moved: Callable[[Move], None] | None = None,
    ) -> None:
        """Call `heard` in the thread for each of `units` once, and `moved` for every move, before its unit's end."""
        self._control, self._missing, self._heard, self._moved = control, set(units), heard, moved
        self._closed, self._hurried = threading.Event(), threading.Event()
        self.error: DistillError | None = None
        if self._missing and control.world_size > 1:
            threading.Thread(target=self._watch, name="announcements", daemon=True).start()

    def hurry(self) -> None:
        """From now on somebody waits for the units."""
        self._hurried.set()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        rank = self._control.rank
        try:
            control, seen, num_moves = self._control.second(), 0, 0
            while self._missing and not self._closed.is_set():
                # The count comes before the moves: a move is said before its unit can end on the taker, so that all
                # moves of the units counted here are heard of first.
                count = control.count("done")
                while self._moved is not None and (move := stolen(control, num_moves)) is not None:
                    self._moved(move)
                    num_moves += 1
                while seen < count and (message := control.get(f"done/{seen}")) is not None:
                    seen += 1
                    announcement = Announcement(Entry(**message["entry"]), int(message["bytes"]))
                    if announcement.entry.unit in self._missing:
                        self._missing.discard(announcement.entry.unit)
                        self._heard(announcement.entry.unit, announcement)
                if not self._hurried.is_set():
                    self._hurried.wait(WATCH_S)
                else:
                    time.sleep(POLL_S)
        except Exception as error:  # whatever it is, the main thread must hear of it
            self.error = DistillError(
                f"rank {rank}: watching for finished blocks failed ({error!r}); read logs/rank{rank}.log"
            )
