"""Which rank is sent which boundary when: addresses in the stream of batches, feeds and their schedule. No torch here.

Rank 0 keeps one Feed per destination (itself included). A feed walks through the addresses that its units still
need; the Schedule decides which address the teacher computes next and for whom. Timing decides only how often a batch
is computed, never what a unit sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from distill.planning.costs import Span
from distill.planning.unit import boundaries_of

TRAIN = -1  # Address.check of a training batch


class Address(NamedTuple):
    """One batch in a stream: training batch `step` (check = TRAIN), or held-out batch `check` looked at after it."""

    step: int
    check: int = TRAIN

    @property
    def is_training(self) -> bool:
        return self.check == TRAIN


@dataclass(frozen=True)
class Checks:
    """After every `every` steps the units look at `batches` held-out batches; every = 0: never."""

    every: int = 0
    batches: int = 0

    def after(self, address: Address) -> Address:
        """Return the address that follows `address`."""
        due = self.every > 0 and (address.step + 1) % self.every == 0
        if due and address.check + 1 < self.batches:
            return Address(address.step, address.check + 1)
        return Address(address.step + 1)


@dataclass(frozen=True)
class Turns:
    """Which of several teacher ranks computes which batch: they take turns, and so with the looks after a step."""

    teacher_ranks: int = 1

    def teacher_of(self, address: Address) -> int:
        return (address.step + address.check - TRAIN) % self.teacher_ranks


class Feed:
    """The addresses one destination still needs, in order, and the boundaries of each."""

    def __init__(
        self, rank: int, spans: Iterable[Span], checks: Checks, *, of: Callable[[Address], bool] = lambda _: True
    ) -> None:
        """Of these addresses only those that `of` holds for: one teacher's turns."""
        self.rank = rank
        self._checks = checks
        self._of = of
        self._spans = {span.unit: span for span in spans if span.steps > 0}
        self.cursor: Address | None = None
        self._settle(Address(min((span.first for span in self._spans.values()), default=0)))

    def units_at(self, address: Address) -> tuple[int, ...]:
        """Return the unfinished units that use the batch at `address`; after its last step a unit looks no more."""
        return tuple(span.unit for span in self._spans_at(address))

    def _spans_at(self, address: Address) -> list[Span]:
        last = address.step if address.is_training else address.step + 1
        return [span for span in self._spans.values() if span.first <= address.step and last < span.budget]

    def boundaries_at(self, address: Address) -> frozenset[int]:
        return boundaries_of(self._spans_at(address))

    def advance(self) -> None:
        """Step past the cursor's address: it has been served."""
        assert self.cursor is not None
        self._settle(self._checks.after(self.cursor))

    def finish(self, unit: int) -> None:
        """Stop serving `unit`: it is done (or has failed)."""
        if self._spans.pop(unit, None) is not None and self.cursor is not None:
            self._settle(self.cursor)

    @property
    def remaining(self) -> tuple[Span, ...]:
        """What has not been served yet of every unfinished unit."""
        if self.cursor is None:
            return ()
        done = self.cursor.step if self.cursor.is_training else self.cursor.step + 1
        left = (replace(span, first=max(span.first, done)) for span in self._spans.values())
        return tuple(span for span in left if span.steps > 0)

    def take(self, span: Span) -> None:
        """Serve a unit from now on that was another destination's; nothing at or after its first step may have been
        served here to units that are still unfinished."""
        if self.cursor is None:
            self._spans.clear()  # they have been served to their ends
        self._spans[span.unit] = span
        first = Address(span.first)
        self._settle(first if self.cursor is None else min(first, self.cursor))

    def _settle(self, address: Address) -> None:
        """Move the cursor to the first address at or after `address` that some unit needs; None when there is none."""
        while not (self.units_at(address) and self._of(address)):
            if self.units_at(address):
                address = self._checks.after(address)
                continue
            later = [span.first for span in self._spans.values() if span.first > address.step]
            if not later:
                self.cursor = None
                return
            address = Address(min(later))
        self.cursor = address


class Service(NamedTuple):
    """One teacher pass: the batch to compute and the ranks it is for."""

    address: Address
    ranks: tuple[int, ...]


class Schedule:
    """Decides the next teacher pass. The lowest address is served first, to everybody who needs it, so that the
    teacher is paid once per batch; a destination that is much slower than the others is waited for only `patience`
    steps and then left behind: it gets its batches in passes of its own, and the others do not wait for it."""

    def __init__(self, feeds: Iterable[Feed], *, patience: float = 2.0, home: int | None = None) -> None:
        """Rank `home` itself is never left behind: the thread that would run ahead of it is its own."""
        self.feeds: Mapping[int, Feed] = {feed.rank: feed for feed in feeds}
        self._patience, self._home = patience, home
        self._behind: set[int] = set()
        self._taking: set[int] = set()  # a unit is on its way to them
        self._step_s: float | None = None
        self._num_steps = 0
        self._served_at: float | None = None
        self._waiting_since: float | None = None

    @property
    def finished(self) -> bool:
        return all(feed.cursor is None for feed in self.feeds.values())

    def finish(self, unit: int) -> None:
        for feed in self.feeds.values():
            feed.finish(unit)

    def move(self, unit: int, source: int, target: int) -> int:
        """Serve `unit` to rank `target` instead of `source`, whose next address must be a training step; return the
        unit's first step there. Nobody waits for the target until it has the unit (see taken()) and has caught up."""
        giver = self.feeds[source]
        assert giver.cursor is not None
        assert giver.cursor.is_training, "a look that has begun belongs to one rank"
        (rest,) = (span for span in giver.remaining if span.unit == unit)
        giver.finish(unit)
        self.feeds[target].take(rest)
        self._taking.add(target)
        return rest.first

    def taken(self, rank: int) -> None:
        """Note that rank `rank` has every unit that has been moved to it; it may have fallen behind meanwhile."""
        self._taking.discard(rank)
        self._behind.add(rank)

    def choose(self, ready: Iterable[int], now: float) -> Service | None:
        """Return the next teacher pass, or None while it is worth waiting for a destination without a free slot.

        `ready` are the ranks that can take a batch; `now` is a clock in seconds. The caller carries the pass out and
        then calls served().
        """
        open_feeds = {rank: feed.cursor for rank, feed in self.feeds.items() if feed.cursor is not None}
        ready = set(ready) & open_feeds.keys()
        self._behind &= open_feeds.keys()
        in_step = {open_feeds[rank] for rank in ready - self._behind}
        if self._home in ready & self._behind and in_step and open_feeds[self._home] < min(in_step):
            ready.remove(self._home)  # it always has a slot: it catches up while nobody else has one
        awaited = ready | (open_feeds.keys() - self._behind - self._taking)
        lowest = min((address for rank, address in open_feeds.items() if rank in awaited), default=None)
        if lowest is None:
            return None
        wanted = {rank for rank, address in open_feeds.items() if address == lowest}
        missing = (wanted & awaited) - ready
        if missing:
            if not ready or self._home in missing or not self._out_of_patience(now):
                return None  # where nobody is ready, leaving someone behind would gain nothing
            self._behind |= missing
            return self.choose(ready, now)
        return Service(lowest, tuple(sorted(wanted & ready)))

    def served(self, service: Service, now: float) -> None:
        """Note that `service` has been carried out at time `now`."""
        # A pass for those behind alone says nothing of the pace of those in step.
        catching_up = self._behind.issuperset(service.ranks)
        for rank in service.ranks:
            self.feeds[rank].advance()
        cursors = {rank: feed.cursor for rank, feed in self.feeds.items() if feed.cursor is not None}
        front = max(cursors.values(), default=None)
        self._behind -= {rank for rank in service.ranks if cursors.get(rank) == front}  # it has caught up
        if not catching_up:
            self._note_step(now)

    def _note_step(self, now: float) -> None:
        """Learn from the time since the last step how long one usually takes; waiting for a slower rank is no work.

        Ranks that are held back are always ready, so a step with a wait in it may only raise the estimate. The first
        step is left out: everything warms up in it.
        """
        self._num_steps += 1
        if self._served_at is not None and self._num_steps > 2:
            took = (self._waiting_since or now) - self._served_at
            if self._step_s is None or took > self._step_s:
                self._step_s = took
            elif self._waiting_since is None:
                self._step_s += 0.2 * (took - self._step_s)
        self._served_at, self._waiting_since = now, None

    def _out_of_patience(self, now: float) -> bool:
        """Whether a ready destination has waited for a slower one for longer than `patience` usual steps."""
        if self._waiting_since is None:
            self._waiting_since = now
        # Before a step has been timed, nobody knows how long is too long.
        if self._step_s is None or self._served_at is None:
            return False
        # What came before the wait counts too: a step that is long for everybody is no reason to leave one of them
        # behind.
        usual = max(self._step_s, self._waiting_since - self._served_at)
        return now - self._waiting_since > self._patience * usual
