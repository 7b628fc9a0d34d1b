"""Work stealing, where ranks run the teacher themselves: a rank that has run dry asks one that has much left, which
gives it units from its own next step on, or says no. Nobody else takes part, and nobody waits for a rank that asks.

In the store: `remaining/RANK`, what a rank says of what it has left; `request/RANK/N` and `answer/RANK/N`, the N-th
request that a rank has heard and its answer; what comes of it is in handover.py.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from distill.distributed.store import POLL_S, Control
from distill.engine.rebalance.handover import HandOver, announce_stolen
from distill.engine.rebalance.moves import Headroom, Load, Move, Work, chosen_moves, expected_steps
from distill.engine.rebalance.pace import Pace, paces_of
from distill.errors import DistillError
from distill.planning.costs import Span
from distill.planning.plan import Plan

LISTEN_S = 0.25  # between two looks for requests: each takes a moment from this rank's training
SAY_S = 0.5  # how often a rank says what it has left
AGAIN_S = 1.0  # how long a rank that was refused waits before it asks again
PROBED = 8  # ranks that are compared before one of them is asked, drawn by chance where there are more


@dataclass(frozen=True)
class Left:
    """What a rank has left: expected seconds (None: not known yet), units that it may give away, and seconds of its
    stretch of the teacher for one whole batch. Once `closed` it gives nothing more."""

    seconds: float | None
    units: int
    pass_s: float
    closed: bool = False


@dataclass(frozen=True)
class Request:
    """A rank that would take units over, the units that it has taken so far, and the first rank of a relay whose
    stretch of the teacher it would have to run for more."""

    rank: int
    taken: tuple[int, ...]
    first_stretch: int


def left_of(control: Control, rank: int) -> Left | None:
    """Return what `rank` has said last; None before it has said anything."""
    found = control.get(f"remaining/{rank}")
    return None if found is None else Left(**found)


def say_headroom(control: Control, headroom: Headroom | None) -> None:
    """Rank 0 says what memory the ranks have left for units that they take."""
    control.set("headroom", {"limited": headroom is not None, "headroom": headroom and asdict(headroom)})


class Giver:
    """A rank's side that gives: requests are heard in a thread and answered between two of its training steps."""

    def __init__(self, control: Control, plan: Plan, *, pass_s: Callable[[], float], plateau: bool) -> None:
        """`pass_s` returns what a pass through this rank's stretch of the teacher has taken so far, `plateau` says that
        units may stop before their budget."""
        self._control, self._plan, self._pass_s, self._plateau = control, plan, pass_s, plateau
        self._rank = control.rank
        self._group = len(plan.group_of(self._rank))
        # what a group trains stays with it
        self._own = {span.unit for span in plan.spans_of(self._rank)} if self._group == 1 else set()
        self._requests: queue.SimpleQueue[tuple[int, Request]] = queue.SimpleQueue()
        self._said_at = -SAY_S
        self._error: DistillError | None = None
        self._closed = threading.Event()
        if len(self._own) > 1:  # the last one stays, so no other rank is ever asked
            threading.Thread(target=self._listen, name="requests", daemon=True).start()

    def moves(self, remaining: Sequence[Span]) -> list[Move]:
        """Return the moves of units away from this rank that happen now, before its next training step, where
        `remaining` is what is left of all its units; raises what the thread met."""
        if self._error is not None:
            raise self._error
        mine = [span for span in remaining if span.unit in self._own]
        if time.monotonic() - self._said_at >= SAY_S:
            self._say(mine)
        moves: list[Move] = []
        while not self._requests.empty():
            number, request = self._requests.get()
            # Announced before it is answered: the taker may finish the unit soon, and everybody hears of moves before
            # ends.
            granted = [announce_stolen(self._control, *move) for move in self._chosen(request, mine)]
            self._control.set(f"answer/{self._rank}/{number}", [asdict(move) for move in granted])
            # the next request in the queue is judged by what this one has left
            mine = [span for span in mine if span.unit not in {move.unit for move in granted}]
            moves += granted
        return moves

    def close(self) -> None:
        """Give nothing any more."""
        self._closed.set()
        # also the answer to requests that nobody reads any more: whoever waits for one looks here too
        self._control.set(f"remaining/{self._rank}", asdict(Left(0.0, 0, self._pass_s(), closed=True)))

    def _say(self, spans: Sequence[Span]) -> None:
        load = self._load(spans, paces_of(self._control, self._rank))
        # a group's pass has each rank run its rows
        left = Left(None if load is None else load.seconds, len(spans), self._pass_s() * self._group)
        self._control.set(f"remaining/{self._rank}", asdict(left))
        self._said_at = time.monotonic()

    def _load(self, spans: Sequence[Span], paces: Mapping[int, Pace]) -> Load | None:
        if any(span.unit not in paces for span in spans):
            return None
        works = tuple(Work(span.unit, self._steps(span), *paces[span.unit]) for span in spans)
        passes = max((work.steps for work in works), default=0)
        return Load(works, passes * self._pass_s(), self._plan.slowness_of(self._rank))

    def _steps(self, span: Span) -> int:
        return expected_steps(span, plateau=self._plateau)

    def _chosen(self, request: Request, spans: Sequence[Span]) -> list[tuple[int, int, int, int]]:
        """Return (unit, source, target, step) of the moves that are worth it; one unit stays."""
        headroom, load = self._control.get("headroom"), self._load(spans, paces_of(self._control, self._rank))
        pass_s = self._pass_of(request)
        if len(spans) < 2 or load is None or headroom is None or pass_s is None:
            return []
        left = Headroom(**headroom["headroom"]) if headroom["limited"] else None
        # rank 0 said the headroom once, at the beginning: what has been taken since is the asking rank's to tell
        for unit in request.taken:
            left = left and left.after(unit, request.rank)
        taker = Load((), slowness=self._plan.slowness_of(request.rank), pass_s=pass_s)
        chosen = chosen_moves({self._rank: load, request.rank: taker}, [request.rank], left)
        first = {span.unit: span.first for span in spans}
        return [(*move, first[move[0]]) for move in chosen[: len(spans) - 1]]

    def _pass_of(self, request: Request) -> float | None:
        """Seconds of the passes through the teacher that this rank's units would take the requesting rank; None where a
        stretch of it has not been timed yet."""
        stretches = [self._rank]
        if self._plan.starts:
            ranks = range(request.first_stretch, self._rank + 1)
            stretches = [rank for rank in ranks if self._plan.spans_of(rank)]
        slowness, total = self._plan.slowness_of, 0.0
        for rank in stretches:
            left = left_of(self._control, rank)
            if left is None or not left.pass_s:
                return None
            total += left.pass_s * slowness(request.rank) / slowness(rank)
        return total

    def _listen(self) -> None:
        try:
            control, heard = self._control.second(), 0
            while not self._closed.wait(LISTEN_S):
                for number in range(heard, control.count(f"requests/{self._rank}")):
                    found = control.get(f"request/{self._rank}/{number}")
                    if found is None:
                        break  # counted, and not said yet
                    self._requests.put((number, Request(**found)))
                    heard = number + 1
        except Exception as error:  # whatever it is, the main thread must hear of it
            self._error = DistillError(
                f"rank {self._rank}: listening for ranks that have run dry failed ({error!r}); read "
                f"logs/rank{self._rank}.log"
            )


class Taker:
    """A rank's side that takes: once it has run dry, a thread asks for units and finds them, again and again."""

    def __init__(self, control: Control, plan: Plan, hand_over: HandOver) -> None:
        self._control, self._hand_over = control, hand_over
        self._spans = {span.unit: span for span in plan.spans}
        givers = [rank for rank in range(plan.world_size) if rank != control.rank and len(plan.group_of(rank)) == 1]
        self._givers = [rank for rank in givers if len(plan.spans_of(rank)) > 1]
        self._random = random.Random(control.rank)
        self._granted: queue.SimpleQueue[Move] = queue.SimpleQueue()
        self._coming: list[Move] = []
        self._taken: list[int] = []
        self._first_stretch = 0
        self._error: DistillError | None = None
        self._dry, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def seek(self, *, first_stretch: int = 0) -> None:
        """Look for units from now on. In a relay the rank would have to run the stretches of the teacher from that of
        rank `first_stretch` on."""
        self._first_stretch = first_stretch
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dry", daemon=True)
            self._thread.start()
        if not self._coming and self._granted.empty():
            self._dry.set()

    def arrived(self) -> list[Move]:
        """Return the moves of the units that have been found, as soon as the states of all of them are here; until
        then nothing. Raises what the thread met."""
        if self._error is not None:
            raise self._error
        while not self._granted.empty():
            move = self._granted.get()
            self._hand_over.expect(move)
            self._coming.append(move)
        if not all(self._hand_over.arrived(move) for move in self._coming):
            return []
        moves, self._coming = self._coming, []
        self._taken += [move.unit for move in moves]
        return moves

    def span_of(self, move: Move) -> Span:
        """Return what a unit has still to do from a move on."""
        return replace(self._spans[move.unit], first=move.step)

    def wait(self, all_done: Callable[[], bool]) -> list[Move]:
        """Look for units until some are here; return their moves, or nothing where nobody has any to give, or where
        `all_done`, which is called again and again and may raise."""
        while True:
            over = self._over.is_set()  # before the look: what is found is there before it is over
            if moves := self.arrived():
                return moves
            if (over and not self._coming) or all_done():
                return []
            self.seek()
            time.sleep(POLL_S)

    def _run(self) -> None:
        try:
            control = self._control.second()
            while self._givers:
                self._dry.wait()
                moves = self._ask(control)
                for move in moves:
                    self._granted.put(move)
                if moves:
                    self._dry.clear()
                else:
                    time.sleep(AGAIN_S)
            self._over.set()
        except DistillError as error:
            self._error = error
        except Exception as error:  # whatever it is, the main thread must hear of it
            rank = self._control.rank
            self._error = DistillError(
                f"rank {rank}: looking for blocks to take over failed ({error!r}); read logs/rank{rank}.log"
            )

    def _ask(self, control: Control) -> list[Move]:
        """Ask the busiest of some ranks; return its answer."""
        probed = self._random.sample(self._givers, min(PROBED, len(self._givers)))
        lefts = {rank: left_of(control, rank) for rank in probed}
        self._givers = [
            rank for rank in self._givers if (left := lefts.get(rank)) is None or (left.units > 1 and not left.closed)
        ]
        known = {rank: left.seconds for rank, left in lefts.items() if left and left.seconds and rank in self._givers}
        if not known:
            return []
        giver = max(known, key=lambda rank: known[rank])
        number = control.count(f"requests/{giver}", 1) - 1
        request = Request(control.rank, tuple(self._taken), self._first_stretch)
        control.set(f"request/{giver}/{number}", asdict(request))
        while True:
            left = left_of(control, giver)  # before the answer, so that none is overlooked
            answer = control.get(f"answer/{giver}/{number}")
            if answer is not None or (left and left.closed):
                return [Move(**move) for move in answer or []]
            control.expect(giver, purpose="answer to the request for blocks")
            time.sleep(POLL_S)
