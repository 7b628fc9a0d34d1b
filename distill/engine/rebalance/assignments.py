"""Rank 0 of a broadcast: the edges to the ranks, what each of them trains, and units that go from one to another.

An edge serves one assignment, the boundaries of a rank's units. A rank whose edge has been closed finds in the store
what comes next: moves to carry out and units to go on with over the next edge, or nothing more. So what is announced
in the store holds from a place in the stream of batches that both ends know.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from distill.distributed.edges.sender import BoundarySender
from distill.distributed.store import Control
from distill.engine.rebalance.handover import HandOver, taken
from distill.engine.rebalance.moves import Headroom, Load, Move, Work, chosen_moves, expected_steps
from distill.engine.rebalance.pace import paces_of
from distill.planning.costs import Span
from distill.planning.plan import Plan
from distill.planning.schedule import Address, Schedule

log = logging.getLogger(__name__)

CONSIDER_EVERY_S = 0.2  # how often rank 0 looks whether a rank that has run dry could take a unit over


@dataclass(frozen=True)
class Assignment:
    """What a rank is to do next: hand over units by `moves`, then train `units`; without both: leave."""

    units: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()


def announce(control: Control, rank: int, number: int, assignment: Assignment) -> None:
    """Say what `rank` finds when the edge of its assignment before the `number`-th has been closed."""
    control.set(f"assignment/{rank}/{number}", asdict(assignment))


def announced(control: Control, number: int) -> Assignment:
    """Wait for this rank's `number`-th assignment."""
    found = control.wait(f"assignment/{control.rank}/{number}", peer=0, purpose="word on what to do next")
    return Assignment(tuple(found["units"]), tuple(Move(**move) for move in found["moves"]))


class Assignments:
    """Who trains what now. Opens, closes and changes edges; decides on moves where `balancer` sees a gain."""

    def __init__(
        self,
        *,
        control: Control,
        schedule: Schedule,
        balancer: Balancer,
        hand_over: HandOver,
        open_edge: Callable[[int, int, int], BoundarySender],
        backlog: int,
        moved: Callable[[Move], None],
    ) -> None:
        """`open_edge` returns the sender for a rank's `number`-th assignment, for so many batches beyond the window.
        While a unit is on its way, up to `backlog` of its batches wait on rank 0, so that the teacher need not compute
        them again. `moved` hears of every move."""
        self._control, self._schedule, self._balancer, self._hand_over = control, schedule, balancer, hand_over
        self._open_edge, self._backlog, self._moved = open_edge, backlog, moved
        self._home = control.rank
        self._numbers = dict.fromkeys((rank for rank in schedule.feeds if rank != self._home), 0)
        self._senders = {rank: open_edge(rank, 0, 0) for rank in self._numbers}
        self._closed: list[BoundarySender] = []
        self._awaited: list[Move] = []  # units on their way to rank 0 itself
        self._on_the_way: list[Move] = []  # to any rank
        self._num_moves = 0
        self._considered = -CONSIDER_EVERY_S

    @property
    def awaiting(self) -> bool:
        """Whether a unit is on its way to rank 0 itself."""
        return bool(self._awaited)

    def ready(self, num_waiting: int) -> set[int]:
        """Return the ranks that can take a batch, where `num_waiting` of rank 0's own wait for their unit; raises what
        the edges' threads met."""
        for sender in self._closed:
            # a closed edge may still have batches under way, and nobody else asks it for its errors
            _ = sender.ready
        own = {self._home} if num_waiting < self._backlog or not self._awaited else set()
        return own | {rank for rank, sender in self._senders.items() if sender.ready}

    def send(self, rank: int, address: Address, boundaries: Mapping[int, Tensor]) -> None:
        self._senders[rank].send(address, boundaries)

    def close_served(self) -> None:
        """Close the edges of ranks that have been served all that they need."""
        for rank in [rank for rank in self._senders if self._schedule.feeds[rank].cursor is None]:
            self._close(rank)

    def changes(self) -> Iterator[Move]:
        """Move units to ranks that have run dry; yield the moves that rank 0 has to carry out itself, now."""
        for move in [move for move in self._awaited if self._hand_over.arrived(move)]:
            self._awaited.remove(move)
            yield move
        now = time.monotonic()
        if now - self._considered >= CONSIDER_EVERY_S:
            self._note_taken()
            dry = self._parked() + [0] * (self._schedule.feeds[0].cursor is None and not self._awaited)
            yield from self._carry_out(self._balancer.moves(dry))
            for rank in self._parked():
                if not self._balancer.could_take(rank):
                    self._dismiss(rank)
            # counted from the end: a look asks the store several times, and may itself take a while
            self._considered = time.monotonic()

    def finish(self) -> None:
        """Nothing is fed any more: let the ranks go and wait until they have taken their last batches."""
        for rank in list(self._senders):
            self._close(rank)
        for rank in self._parked():
            self._dismiss(rank)
        for sender in self._closed:
            sender.join()

    def waited_for(self) -> tuple[str, int]:
        """Say what has not happened where nobody is ready, and the first rank whose doing it is."""
        slow = sorted(rank for rank, sender in self._senders.items() if not sender.ready)
        if slow or not self._awaited:
            return f"ranks {slow} have taken no batch", min(slow, default=1)
        move = self._awaited[0]
        return f"the state of block {move.unit} has not come from rank {move.source}", move.source

    def _note_taken(self) -> None:
        targets = {move.target for move in self._on_the_way}
        self._on_the_way = [move for move in self._on_the_way if not taken(self._control, move)]
        for rank in targets - {move.target for move in self._on_the_way}:
            self._schedule.taken(rank)

    def _parked(self) -> list[int]:
        """The ranks that wait for word on what to do next."""
        return [rank for rank in self._numbers if rank not in self._senders]

    def _close(self, rank: int) -> None:
        sender = self._senders.pop(rank)
        sender.close()
        self._closed.append(sender)

    def _dismiss(self, rank: int) -> None:
        announce(self._control, rank, self._numbers.pop(rank) + 1, Assignment())

    def _carry_out(self, chosen: Sequence[tuple[int, int, int]]) -> Iterator[Move]:
        """Change the feeds, then the edges of the ranks concerned, once each."""
        moves = []
        for unit, source, target in chosen:
            moves.append(Move(self._num_moves, unit, source, target, self._schedule.move(unit, source, target)))
            self._num_moves += 1
            # before anybody is told: the unit may end on its new rank soon, and is expected from there by then
            self._moved(moves[-1])
        self._on_the_way += moves
        for rank in self._numbers.keys() & {rank for move in moves for rank in (move.source, move.target)}:
            self._reassign(rank, tuple(move for move in moves if rank in (move.source, move.target)))
        for move in moves:
            if move.source == 0:
                yield move
            elif move.target == 0:
                self._hand_over.expect(move)
                self._awaited.append(move)

    def _reassign(self, rank: int, moves: tuple[Move, ...]) -> None:
        units = tuple(span.unit for span in self._schedule.feeds[rank].remaining)
        self._numbers[rank] += 1
        # before the edge is closed: a rank that has come to its end finds the word there and need not wait for it
        announce(self._control, rank, self._numbers[rank], Assignment(units, moves))
        if rank in self._senders:
            self._close(rank)
        if units:
            takes = any(move.target == rank for move in moves)
            self._senders[rank] = self._open_edge(rank, self._numbers[rank], takes * self._backlog)


class Balancer:
    """Which units should move, by what the steps of every unit have taken so far."""

    def __init__(
        self,
        *,
        control: Control,
        schedule: Schedule,
        plan: Plan,
        moves_units: bool,
        headroom: Headroom | None,
        plateau: bool,
        teacher_s: Callable[[], float],
    ) -> None:
        """Without `moves_units` units stay where they are, and where there is no `headroom`; `plateau` says that they
        may stop before their budget, `teacher_s` what a teacher pass takes."""
        self._control, self._schedule, self._plan = control, schedule, plan
        self._moves_units, self._plateau, self._teacher_s = moves_units, plateau, teacher_s
        self._headroom = headroom

    def moves(self, dry: Collection[int]) -> list[tuple[int, int, int]]:
        """Return (unit, source, target) of the moves to ranks that have run `dry` that must happen now, and take their
        headroom: none where somebody's pace is not known yet, or where the busiest rank is in the middle of a look."""
        feeds = self._schedule.feeds
        if not any(self.could_take(rank) for rank in dry):
            return []
        left = {rank: feed.remaining for rank, feed in feeds.items()}
        paces = {rank: paces_of(self._control, rank) for rank in feeds if left[rank]}
        if any(span.unit not in paces[rank] for rank in paces for span in left[rank]):
            return []
        passes = max(self._steps(span) for spans in left.values() for span in spans)
        loads = {}
        for rank, spans in left.items():
            works = tuple(Work(span.unit, self._steps(span), *paces[rank][span.unit]) for span in spans)
            loads[rank] = Load(works, 0.0 if rank else passes * self._teacher_s(), self._plan.slowness_of(rank))
        moves = chosen_moves(loads, dry, self._headroom)
        givers = [feeds[source].cursor for _, source, _ in moves]
        if not all(address is not None and address.is_training for address in givers):
            return []
        for unit, _, target in moves:
            self._headroom = self._headroom and self._headroom.after(unit, target)
        return moves

    def could_take(self, rank: int) -> bool:
        """Whether a unit could ever be better off on `rank`: where another has several, or one beside the teacher or
        on a slower machine, and there is headroom for it."""
        if not self._moves_units:
            return False
        slowness = self._plan.slowness_of
        others = {other: feed.remaining for other, feed in self._schedule.feeds.items() if other != rank}
        return any(
            self._headroom is None or self._headroom.fits(span.unit, rank)
            for other, spans in others.items()
            for span in spans
            if len(spans) > 1 or other == 0 or slowness(other) > slowness(rank)
        )

    def _steps(self, span: Span) -> int:
        return expected_steps(span, plateau=self._plateau)
