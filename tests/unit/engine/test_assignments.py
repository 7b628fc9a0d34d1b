"""When blocks move and what becomes of the edges: rank 0 of a broadcast, without ranks, tensors or connections."""

from __future__ import annotations

from typing import Any

import pytest

from distill.engine.rebalance import assignments
from distill.engine.rebalance.assignments import Assignments, Balancer
from distill.engine.rebalance.moves import Headroom, Move
from distill.errors import DistillError
from distill.planning.costs import Span
from distill.planning.plan import Plan
from distill.planning.schedule import Checks, Feed, Schedule

EVEN = 1.0  # seconds of a step


class Said:
    """A store in which every rank has said what a step of its blocks takes."""

    def __init__(self, paces: dict[int, dict[int, float]]) -> None:
        self._paces = paces

    def get(self, key: str) -> Any:
        rank = int(key.removeprefix("pace/"))
        return {str(block): [seconds, 0] for block, seconds in self._paces.get(rank, {}).items()}


def balancer(
    *owners: tuple[int, ...], spans: tuple[Span, ...], checks: Checks | None = None, **changes: Any
) -> tuple[Balancer, Schedule]:
    """The balancer of a broadcast in which every step takes as long, unless told otherwise."""
    checks = checks or Checks()
    slowness = changes.pop("slowness", ())
    plan = Plan("broadcast", owners, spans, 1.0, (1.0,) * len(owners), slowness=slowness)
    schedule = Schedule(Feed(rank, plan.spans_of(rank), checks) for rank in range(len(owners)))
    settings: dict[str, Any] = {
        "control": Said({rank: dict.fromkeys(owned, EVEN) for rank, owned in enumerate(owners)}),
        "moves_units": True,
        "headroom": None,
        "plateau": False,
        "teacher_s": lambda: 0.0,
    }
    return Balancer(schedule=schedule, plan=plan, **settings | changes), schedule


HUNDRED = (Span(0, 0, 100), Span(1, 0, 100))


def test_a_dry_rank_is_given_one_of_two_blocks() -> None:
    assert balancer((), (0, 1), (), spans=HUNDRED)[0].moves([2]) == [(0, 1, 2)]


def test_nothing_moves_where_blocks_stay_or_somebodys_pace_is_not_known() -> None:
    assert balancer((), (0, 1), (), spans=HUNDRED, moves_units=False)[0].moves([2]) == []
    assert balancer((), (0, 1), (), spans=HUNDRED, control=Said({1: {0: EVEN}}))[0].moves([2]) == []


def test_the_teachers_passes_are_part_of_what_rank_0_has_left_and_of_no_other_rank() -> None:
    only = (Span(0, 0, 100),)
    assert balancer((0,), (), spans=only, teacher_s=lambda: EVEN)[0].moves([1]) == [(0, 0, 1)]
    assert balancer((), (0,), (), spans=only, teacher_s=lambda: EVEN)[0].moves([2]) == []
    assert balancer((), (0, 1), (), spans=HUNDRED, teacher_s=lambda: 3 * EVEN)[0].moves([2]) == []


def test_a_block_that_may_stop_early_is_expected_to_go_on_as_long_as_it_has_been_trained() -> None:
    spans = (Span(0, 4, 100), Span(1, 50, 100))
    paces = Said({1: {0: EVEN, 1: EVEN / 20}})  # 96 and 2.5 seconds left, or 4 and 2.5
    assert balancer((), (0, 1), (), spans=spans, control=paces)[0].moves([2]) == []
    assert balancer((), (0, 1), (), spans=spans, control=paces, plateau=True)[0].moves([2]) == [(1, 1, 2)]


def test_no_block_leaves_a_rank_in_the_middle_of_a_look() -> None:
    found, schedule = balancer((), (0, 1), (), spans=HUNDRED, checks=Checks(every=1, batches=2))
    schedule.feeds[1].advance()
    assert found.moves([2]) == []
    schedule.feeds[1].advance()
    schedule.feeds[1].advance()
    assert found.moves([2]) == [(0, 1, 2)]


def test_room_that_a_move_has_taken_stays_taken() -> None:
    headroom = Headroom((50, 50, 10), on_target=(10, 10), on_rank_0=(0, 0))
    found, _ = balancer((), (0, 1), (), spans=HUNDRED, headroom=headroom)
    assert found.could_take(2)
    assert found.moves([2]) == [(0, 1, 2)]
    assert not found.could_take(2)
    assert found.moves([2]) == []


def test_a_rank_can_take_what_is_one_of_several_or_beside_the_teacher_or_on_a_slower_rank() -> None:
    one = (Span(0, 0, 100),)
    assert balancer((), (0, 1), (), spans=HUNDRED)[0].could_take(2)
    assert balancer((0,), (), spans=one)[0].could_take(1)
    assert not balancer((), (0,), (), spans=one)[0].could_take(2)
    assert not balancer((), (0,), (), spans=one)[0].could_take(1), "its own"
    assert balancer((), (0,), (), spans=one, slowness=(1.0, 2.0, 1.0))[0].could_take(2)
    assert not balancer((), (0,), (), spans=one, slowness=(1.0, 1.0, 2.0))[0].could_take(2)
    assert not balancer((), (0, 1), (), spans=HUNDRED, moves_units=False)[0].could_take(2)


class Store(dict[str, Any]):
    """Rank 0's view of the control plane."""

    rank = 0

    def set(self, key: str, value: Any) -> None:
        self[key] = value


class Edge:
    """The sending end of an edge as rank 0 sees it."""

    def __init__(self) -> None:
        self.closed = self.joined = False
        self.error: DistillError | None = None

    @property
    def ready(self) -> bool:
        if self.error is not None:
            raise self.error
        return True

    def close(self) -> None:
        self.closed = True

    def join(self) -> None:
        assert self.closed
        self.joined = True


class Requests:
    """A balancer that wants what the test says, once, and remembers who was dry."""

    def __init__(self, *moves: tuple[int, int, int]) -> None:
        self.wanted, self.dry = list(moves), list[list[int]]()

    def moves(self, dry: list[int]) -> list[tuple[int, int, int]]:
        self.dry.append(sorted(dry))
        found, self.wanted = self.wanted, []
        return found

    def could_take(self, _: int) -> bool:
        return True


class Incoming:
    """Rank 0's hand-overs: what it expects arrives when the test says so."""

    def __init__(self) -> None:
        self.expected, self.here = list[Move](), False

    def expect(self, move: Move) -> None:
        self.expected.append(move)

    def arrived(self, _: Move) -> bool:
        return self.here


class Stage:
    """Rank 0's assignments with all that they touch; BACKLOG batches may wait for a state."""

    BACKLOG = 4

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *owners: tuple[int, ...], requests: tuple[tuple[int, int, int], ...] = ()
    ) -> None:
        monkeypatch.setattr(assignments, "CONSIDER_EVERY_S", 0.0)
        spans = [[Span(block, 0, 100) for block in owned] for owned in owners]
        self.schedule = Schedule((Feed(rank, owned, Checks()) for rank, owned in enumerate(spans)), home=0)
        self.store, self.requests, self.incoming = Store(), Requests(*requests), Incoming()
        self.edges: dict[tuple[int, int], Edge] = {}
        self.more: dict[tuple[int, int], int] = {}
        whatever: dict[str, Any] = {"control": self.store, "balancer": self.requests, "hand_over": self.incoming}
        self.found = Assignments(
            schedule=self.schedule, open_edge=self._open, backlog=self.BACKLOG, moved=lambda _: None, **whatever
        )

    def _open(self, rank: int, number: int, more: int) -> Any:
        self.more[rank, number] = more
        return self.edges.setdefault((rank, number), Edge())

    def look(self) -> list[Move]:
        """Close the edges of ranks that have been served, and change what is to be changed."""
        self.found.close_served()
        return list(self.found.changes())


def test_a_moved_block_is_announced_before_new_edges_and_more_batches_may_wait_for_its_taker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch, (), (0, 1), (2,), requests=((0, 1, 2),))
    stage.schedule.finish(2)
    assert stage.look() == []
    assert stage.requests.dry == [[0, 2]]
    assert [stage.edges[rank, 0].closed for rank in (1, 2)] == [True, True]
    assert (stage.more[1, 1], stage.more[2, 1]) == (0, Stage.BACKLOG)
    announced = [stage.store[f"assignment/{rank}/1"] for rank in (1, 2)]
    assert [found["units"] for found in announced] == [(1,), (0,)]
    assert [found["moves"][0]["unit"] for found in announced] == [0, 0]


def test_a_taker_is_waited_for_again_once_it_has_the_state_and_has_caught_up(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, (), (0, 1), (2,), requests=((0, 1, 2),))
    stage.schedule.finish(2)
    noted = list[int]()
    monkeypatch.setattr(stage.schedule, "taken", noted.append)
    stage.look()
    stage.look()
    assert noted == []
    stage.store["taken/0"] = True
    stage.look()
    assert noted == [2]


def test_rank_0_computes_no_more_than_the_backlog_ahead_for_a_block_that_is_on_its_way_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch, (3,), (0, 1), requests=((0, 1, 0),))
    stage.schedule.finish(3)
    assert stage.look() == []
    assert stage.found.awaiting
    assert 0 in stage.found.ready(Stage.BACKLOG - 1)
    assert 0 not in stage.found.ready(Stage.BACKLOG)
    (move,) = stage.incoming.expected
    stage.schedule.finish(0)
    assert stage.look() == []
    assert stage.requests.dry[-1] == [], "a rank with a block on its way to it is not dry, even if that has ended"
    stage.incoming.here = True
    assert stage.look() == [move]
    assert not stage.found.awaiting
    assert 0 in stage.found.ready(Stage.BACKLOG)


def test_what_an_edge_meets_after_it_has_been_closed_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, (0,), (1,))
    stage.schedule.finish(1)
    stage.look()
    stage.edges[1, 0].error = DistillError("rank 1 failed")
    with pytest.raises(DistillError, match="rank 1 failed"):
        stage.found.ready(0)


def test_at_the_end_every_rank_is_let_go_and_has_taken_its_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, (0,), (1,), (2,))
    stage.schedule.finish(1)
    stage.look()
    stage.found.finish()
    assert all(edge.joined for edge in stage.edges.values())
    for rank in (1, 2):
        assert stage.store[f"assignment/{rank}/1"] == {"units": (), "moves": ()}
