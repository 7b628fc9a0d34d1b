"""Finished blocks on their way to the ledger: the owner's side and rank 0's, here in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest

from distill.distributed.store import Control, PeerLostError
from distill.distributed.transport import TransportError
from distill.engine.completion import Collector, Deliverer
from distill.engine.news import News
from distill.engine.rebalance.handover import announce_stolen
from distill.errors import DistillError
from distill.observability.trace import Trace
from distill.planning.costs import Span
from distill.planning.plan import Plan
from distill.storage.ledger import Entry, Ledger
from tests.dist.ranks import stop_heart, two_controls

ENTRY = Entry(
    unit=3, block=3, name="layer", rank=1, steps=6, status="finished", rel_error_first=1.0, rel_error_last=0.5,
    seconds=1.0, finished_at_s=1.0, generation=1,
)  # fmt: skip


class SlowLedger(Ledger):
    """A ledger on a slow disk, or on one that fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.written, self._error = threading.Event(), error
        self.free = threading.Event()

    def record(self, entry: Entry, blob: bytes) -> Entry:
        assert self.free.wait(10)
        if self._error is not None:
            raise self._error
        assert blob == b"weights"
        self.written.set()
        return entry


def collector(control: Control, ledger: Ledger, recorded: Callable[[Entry], None] = lambda _: None) -> Collector:
    return Collector(
        control, ledger, own=[], elsewhere={3: 1}, wake=threading.Event(), on_recorded=recorded, trace=Trace()
    )


def test_a_block_is_confirmed_only_once_it_is_in_the_ledger() -> None:
    ledger, recorded = SlowLedger(), list[Entry]()
    with two_controls() as (here, there):
        collecting, owner = collector(here, ledger, recorded.append), Deliverer(there, Trace())
        owner.deliver(ENTRY, b"weights")
        news, deadline = list[int](), time.monotonic() + 10
        while not news and time.monotonic() < deadline:
            news = collecting.finished_elsewhere()
            time.sleep(0.02)
        assert news == [3], "the teacher stops for it without waiting for the disk"
        time.sleep(0.3)  # in which a confirmation would come, were it not for the disk
        assert there.get("collected/3") is None
        ledger.free.set()
        owner.close()
        assert ledger.written.is_set()
        collecting.wait(all_fed=True)
    assert recorded == [ENTRY]


class Kept(Ledger):
    """A ledger that keeps what it is given."""

    def __init__(self) -> None:
        self.blobs: dict[int, bytes] = {}

    def record(self, entry: Entry, blob: bytes) -> Entry:
        self.blobs[entry.unit] = blob
        return entry


def test_blocks_that_finish_together_are_all_announced_before_the_first_is_collected() -> None:
    ledger, blobs = Kept(), {block: bytes([block]) * 1000 * block for block in (3, 1, 2)}
    with two_controls() as (here, there):
        owner = Deliverer(there, Trace())
        for block, blob in blobs.items():
            owner.deliver(replace(ENTRY, unit=block), blob)
        assert there.count("done") == 3
        collecting = Collector(
            here, ledger, own=[], elsewhere=dict.fromkeys(blobs, 1), wake=threading.Event(),
            on_recorded=lambda _: None, trace=Trace(),
        )  # fmt: skip
        collecting.wait(all_fed=True)
        owner.close()
    assert ledger.blobs == blobs
    assert list(ledger.blobs) == list(blobs), "in the order in which they finished"


def test_a_disk_that_fails_is_told_on_rank_0_and_the_owner_is_not_told_that_all_is_well() -> None:
    ledger = SlowLedger(OSError("no space left on device"))
    with two_controls(timeout_s=2.0) as (here, there):
        collecting, owner = collector(here, ledger), Deliverer(there, Trace())
        owner.deliver(ENTRY, b"weights")
        ledger.free.set()
        with pytest.raises(TransportError, match=r"rank 0: collecting a finished block of rank 1 failed .no space"):
            collecting.wait(all_fed=True)
        with pytest.raises(PeerLostError, match="rank 1: no confirmation of block 3 from rank 0 after"):
            owner.close()


def test_weights_that_do_not_come_are_waited_for_until_the_deadline() -> None:
    with two_controls(timeout_s=1.0) as (here, _):
        collecting = collector(here, SlowLedger())
        with pytest.raises(DistillError, match=r"rank 0: blocks \[3\] have not come for 1 s"):
            collecting.wait(all_fed=True)


def test_a_rank_that_trains_on_by_itself_is_waited_for_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.distributed.store.HEARTBEAT_S", 0.1)  # a busy machine may miss a few
    ledger = SlowLedger()
    ledger.free.set()
    with two_controls(timeout_s=1.5) as (here, there):
        collecting, owner = collector(here, ledger), Deliverer(there, Trace())
        threading.Timer(3.0, lambda: owner.deliver(ENTRY, b"weights")).start()
        collecting.wait(all_fed=False)
        assert ledger.written.is_set()
        owner.close()


def test_a_rank_that_trains_on_by_itself_and_dies_is_named() -> None:
    with two_controls(timeout_s=1.5) as (here, there):
        stop_heart(there)
        with pytest.raises(PeerLostError, match="rank 0: no finished blocks from rank 1"):
            collector(here, SlowLedger()).wait(all_fed=False)


def test_a_block_that_has_moved_is_waited_for_at_its_new_rank() -> None:
    with two_controls(timeout_s=1.0) as (here, there):
        stop_heart(there)
        collecting = collector(here, SlowLedger())
        collecting.moved(3, 0)
        with pytest.raises(DistillError, match=r"rank 0: blocks \[3\] have not come"):
            collecting.wait(all_fed=False)
        collecting.moved(3, 1)
        with pytest.raises(PeerLostError, match="rank 0: no finished blocks from rank 1"):
            collecting.wait(all_fed=False)


def test_what_rank_0_trains_itself_is_announced_for_whoever_runs_the_teacher_for_it() -> None:
    ledger = SlowLedger()
    ledger.free.set()
    with two_controls() as (here, there):
        own = Collector(
            here, ledger, own=[3], elsewhere={}, wake=threading.Event(), on_recorded=lambda _: None, trace=Trace()
        )
        own.deliver(replace(ENTRY, rank=0), b"weights")
        own.wait(all_fed=True)
        assert there.get("done/0")["entry"]["rank"] == 0


def listen(news: News) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        news.finished_elsewhere()
        time.sleep(0.02)


def test_a_teacher_rank_that_can_no_longer_hear_of_finished_blocks_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("broadcast", ((0,), (1,)), (Span(0, 0, 1), Span(1, 0, 1)), 1.0, (1.0, 1.0), teacher_ranks=2)
    monkeypatch.setattr(Control, "second", mock.Mock(side_effect=OSError("no route to host")))
    with two_controls() as (_, there), pytest.raises(DistillError, match=r"rank 1: watching for finished.*no route"):
        listen(News(there, plan))


def test_a_relay_feeds_a_block_no_more_that_another_rank_has_taken_unless_it_has_done_so_itself() -> None:
    plan = Plan("relay", ((), (0,), (1, 2)), tuple(Span(block, 0, 9) for block in range(3)), 1.0, (1.0,) * 3, (0, 0, 1))
    with two_controls() as (elsewhere, here):  # here is rank 1
        news = News(here, plan)
        announce_stolen(elsewhere, 1, source=2, target=1, step=5)
        announce_stolen(elsewhere, 2, source=2, target=0, step=5)
        heard, deadline = list[int](), time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            heard = news.finished_elsewhere()
            time.sleep(0.02)
        news.close()
    assert heard == [2]
