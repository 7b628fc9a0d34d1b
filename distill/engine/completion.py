"""How finished units reach the ledger without anybody waiting: owners announce and hand over in the background,
rank 0 collects, records and confirms.

An announcement (JSON, control plane) says that a unit is done, so that rank 0 stops producing for it at once; the
weights follow over an edge of their own; the owner leaves when every unit of its own is confirmed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping

from distill.distributed.store import POLL_S, Control
from distill.distributed.transport import Edge, receive_blob, send_blob
from distill.engine.announcements import Announcement, Announcements, announce
from distill.engine.rebalance.moves import Move
from distill.errors import DistillError
from distill.observability.trace import Trace
from distill.storage.ledger import Entry, Ledger


class Deliverer:
    """An owner's side: deliver() returns at once, a thread does the rest."""

    def __init__(self, control: Control, trace: Trace) -> None:
        self._control, self._trace = control, trace
        self._queue: queue.SimpleQueue[tuple[Entry, bytes] | None] = queue.SimpleQueue()
        self._error: DistillError | None = None
        self._thread = threading.Thread(target=self._run, name="deliver", daemon=True)
        self._thread.start()

    def deliver(self, entry: Entry, blob: bytes) -> None:
        """Hand over a finished unit: its ledger entry and its weights as safetensors bytes."""
        if self._error is not None:
            raise self._error
        announce(self._control, entry, len(blob))
        self._queue.put((entry, blob))

    def close(self) -> None:
        """Wait until rank 0 has confirmed everything; raises what the thread met."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        edge = Edge(self._control.rank, 0, self._control.generation, self._control.timeout_s, "weights")
        try:
            control, group = self._control.second(), None
            handed_over = []
            while (item := self._queue.get()) is not None:
                entry, blob = item
                # not before the first unit: rank 0 makes its end when it hears of one, and connecting has a time limit
                if group is None:
                    group = edge.connect(control.store_for("edges"), control.rank)
                with self._trace.span("ledger", f"hand over {entry.name}"):
                    send_blob(group, blob)
                handed_over.append(entry.unit)
                del item, blob  # not until the next one comes
            for unit in handed_over:  # only now, so that no unit waits for rank 0's disk to have the one before it
                purpose = f"confirmation of block {unit}"
                control.wait(f"collected/{unit}", peer=0, purpose=purpose, limit_s=control.timeout_s)
        except DistillError as error:
            self._error = error
        except Exception as error:  # whatever it is, the main thread must hear of it
            self._error = edge.broken(self._control.rank, "handing a finished block to", error)


class Collector:
    """Rank 0's side: watches for announcements, receives weights (one thread per owner) and writes the ledger."""

    def __init__(
        self,
        control: Control,
        ledger: Ledger,
        *,
        own: Collection[int],
        elsewhere: Mapping[int, int],
        wake: threading.Event,
        on_recorded: Callable[[Entry], None],
        on_stolen: Callable[[Move], None] | None = None,
        trace: Trace,
    ) -> None:
        """Collect the units `own` of rank 0 and those trained `elsewhere` (unit -> rank). `on_stolen` hears, in a
        thread, of units that ranks take from one another."""
        self._control, self._trace = control, trace
        self._ledger = ledger
        self._missing = {*own, *elsewhere}
        self._elsewhere = dict(elsewhere)  # those that have not been announced yet
        self._wake = wake
        self._on_recorded, self._on_stolen = on_recorded, on_stolen
        self._lock = threading.Lock()
        self._news: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._error: DistillError | None = None
        self._queues: dict[int, queue.SimpleQueue[tuple[Entry, bytes | int] | None]] = {}
        watched = self._missing if elsewhere or on_stolen else ()  # any unit may come to be trained elsewhere
        self._announcements = Announcements(
            control, units=watched, heard=self._announced, moved=self._stolen if on_stolen else None
        )

    def deliver(self, entry: Entry, blob: bytes) -> None:
        """Take a unit that rank 0 has trained itself; it is written in the background, and announced to the others:
        they may run the teacher for it."""
        announce(self._control, entry, len(blob))
        self._hand_to_thread(0, entry, blob)

    def moved(self, unit: int, rank: int) -> None:
        """Expect a unit from another rank than before."""
        self._elsewhere.pop(unit, None)
        if rank != 0:
            self._elsewhere[unit] = rank

    def finished_elsewhere(self) -> list[int]:
        """Return the units announced since the last call as finished or as taken by another rank; raises what a
        background thread met."""
        error = self._error or self._announcements.error
        if error is not None:
            raise error
        news = []
        while not self._news.empty():
            news.append(self._news.get())
        return news

    def complete(self) -> bool:
        """Return whether every unit is in the ledger, for which somebody waits from now on; raises what a background
        thread met, and if a rank that still trains some has fallen silent."""
        self._announcements.hurry()
        self.finished_elsewhere()
        for rank in sorted(set(self._elsewhere.values())):
            self._control.expect(rank, purpose="finished blocks")
        return not self._missing

    def wait(self, *, all_fed: bool) -> None:
        """Wait until every unit is in the ledger. Where all ranks are `all_fed`, at most plan.timeout_s for the next
        one: each has been announced or had its last batch, so only weights are still on their way. Ranks that run the
        teacher themselves may train on for long: these are waited for as long as they are alive."""
        missing, since = len(self._missing) + 1, time.monotonic()
        while not self.complete():
            if (self._elsewhere and not all_fed) or len(self._missing) < missing:
                missing, since = len(self._missing), time.monotonic()
            elif time.monotonic() - since > self._control.timeout_s:
                raise DistillError(
                    f"rank 0: blocks {sorted(self._missing)} have not come for {self._control.timeout_s:g} s; read the "
                    "logs of their ranks (plan.json), or raise plan.timeout_s"
                )
            self._wake.wait(POLL_S)
            self._wake.clear()
        self._announcements.close()
        for owner in self._queues.values():
            owner.put(None)

    def _announced(self, unit: int, announcement: Announcement) -> None:
        if announcement.entry.rank == 0:
            return  # delivered here
        # no longer waited for by its rank's heartbeats: its weights have a deadline of their own on the edge
        self._elsewhere.pop(unit, None)
        self._news.put(unit)
        self._hand_to_thread(announcement.entry.rank, announcement.entry, announcement.bytes)
        self._wake.set()

    def _stolen(self, move: Move) -> None:
        if move.target != 0:
            self._news.put(move.unit)  # rank 0 need not feed it any more
        if self._on_stolen is not None:
            self._on_stolen(move)

    def _hand_to_thread(self, owner: int, entry: Entry, content: bytes | int) -> None:
        if owner not in self._queues:
            self._queues[owner] = queue.SimpleQueue()
            threading.Thread(target=self._collect, args=(owner,), name=f"collect-{owner}", daemon=True).start()
        self._queues[owner].put((entry, content))

    def _collect(self, owner: int) -> None:
        edge = Edge(owner, 0, self._control.generation, self._control.timeout_s, "weights")
        try:
            control, group = self._control.second(), None
            while (item := self._queues[owner].get()) is not None:
                entry, content = item
                if isinstance(content, int):
                    group = group or edge.connect(control.store_for("edges"), 0)
                    content = receive_blob(group, content)
                # one thread an owner, but one ledger: its lines are written one at a time
                with self._lock, self._trace.span("ledger", f"record {entry.name}"):
                    entry = self._ledger.record(entry, content)
                self._on_recorded(entry)
                control.set(f"collected/{entry.unit}", True)
                # after all else: when nothing is missing the main thread goes on without this one
                self._missing.discard(entry.unit)
                self._wake.set()
                del item, content  # not until the next one comes
        except DistillError as error:
            self._fail(error)
        except Exception as error:  # whatever it is, the main thread must hear of it
            self._fail(edge.broken(0, "collecting a finished block of", error))

    def _fail(self, error: DistillError) -> None:
        self._error = error
        self._wake.set()
