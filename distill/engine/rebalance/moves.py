"""Whether a rank that has run dry should take a unit over from the busiest rank: arithmetic alone. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from distill.planning.costs import Span
from distill.planning.memory_model import Memory

SET_UP_S = 0.1  # of a hand-over: two edges anew, one for the state, and a trainer to be made
STATE_BYTES_PER_S = 1e8  # at which a state travels; a little less than gigabit Ethernet carries
LEAST_GAIN = 0.1  # of the giver's remaining seconds: what a move must save, predictions being what they are


@dataclass(frozen=True)
class Work:
    """What is left of one unit: its steps, seconds of one on the rank that has it, and bytes of its state."""

    unit: int
    steps: int
    step_s: float
    state_bytes: int

    @property
    def seconds(self) -> float:
        return self.steps * self.step_s


@dataclass(frozen=True)
class Load:
    """What is left for one rank: units, and seconds that stay with it (rank 0's teacher). It takes `slowness` times as
    long as a usual rank; one that must run a stretch of the teacher for its units takes `pass_s` for each step of
    theirs, once for all of them."""

    works: tuple[Work, ...]
    fixed_s: float = 0.0
    slowness: float = 1.0
    pass_s: float = 0.0

    @property
    def seconds(self) -> float:
        passes = max((work.steps for work in self.works), default=0) if self.pass_s else 0
        return self.fixed_s + passes * self.pass_s + sum(work.seconds for work in self.works)


@dataclass(frozen=True)
class Move:
    """Unit `unit` goes from rank `source` to rank `target`, which trains it from step `step` on. Moves of a stage are
    numbered in their order."""

    number: int
    unit: int
    source: int
    target: int
    step: int


@dataclass(frozen=True)
class Headroom:
    """Memory for moves, in bytes: what every rank has `left`, and what a unit takes, by the bounds that placements
    keep to. It only gets less: what finished units, and those that were given away, leave free is not counted on."""

    left: tuple[int, ...]
    on_target: tuple[int, ...]  # by unit: where it is trained
    on_rank_0: tuple[int, ...]  # by unit: its batches that wait while its state is on the way

    @staticmethod
    def of(memory: Memory | None, owners: Sequence[Collection[int]], *, backlog: int) -> Headroom | None:
        """Return the headroom beside the units that the ranks have by the plan, where up to `backlog` batches wait for
        a state; None where memory has no limit."""
        if memory is None or memory.limit is None:
            return None
        units = range(len(memory.student))
        headrooms = [memory.room(sends=rank == 0) or 0 for rank in range(len(owners))]
        return Headroom(
            tuple(headroom - sum(map(memory.unit, owned)) for headroom, owned in zip(headrooms, owners, strict=True)),
            tuple(map(memory.unit, units)),
            tuple(backlog * memory.activations([unit]) for unit in units),
        )

    @staticmethod
    def beside(memory: Memory, needed: Sequence[int]) -> Headroom | None:
        """Return the headroom beside the bytes that every rank needs by the plan, where a rank that takes a unit runs
        the teacher for it; None where memory has no limit."""
        if memory.limit is None:
            return None
        units = range(len(memory.student))
        return Headroom(
            tuple(memory.limit - bytes_ for bytes_ in needed),
            tuple(memory.alone([unit]) - memory.resident for unit in units),
            (0,) * len(units),
        )

    def after(self, unit: int, target: int) -> Headroom:
        """Return the headroom that a move leaves."""
        left = list(self.left)
        left[target] -= self.on_target[unit]
        left[0] -= self.on_rank_0[unit]
        return replace(self, left=tuple(left))

    def fits(self, unit: int, target: int) -> bool:
        """Whether rank `target` and rank 0 have the headroom for a move of `unit`."""
        left = self.after(unit, target).left
        return left[target] >= 0 and left[0] >= 0


def expected_steps(span: Span, *, plateau: bool) -> int:
    """Return the steps that a unit is expected to go on for. One that may stop at a plateau is expected to go on for
    as long as it has been trained: half of what has come to some age by chance is past half of its life."""
    return min(span.steps, span.first) if plateau else span.steps


def chosen_moves(
    loads: Mapping[int, Load], dry: Collection[int], headroom: Headroom | None = None
) -> list[tuple[int, int, int]]:
    """Return (unit, source, target) of the moves to `dry` ranks, which have no units left, that are worth their price
    and fit in `headroom`, one after another.

    Each takes a unit from the rank that is busiest by then and shortens what it and the target have left by at least
    LEAST_GAIN; no unit is moved twice.
    """
    after, moves = dict(loads), list[tuple[int, int, int]]()
    while (move := _best_move(after, dry, headroom, moved={unit for unit, _, _ in moves})) is not None:
        moves.append(move)
        after |= _carried_out(after, *move)
        headroom = headroom and headroom.after(move[0], move[2])
    return moves


def _best_move(
    loads: Mapping[int, Load], dry: Collection[int], headroom: Headroom | None, moved: Collection[int]
) -> tuple[int, int, int] | None:
    source = max(loads, key=lambda rank: loads[rank].seconds)
    before = loads[source].seconds
    choices = [
        (max(load.seconds for load in _carried_out(loads, work.unit, source, target).values()), work.unit, target)
        for work in loads[source].works
        for target in dry
        if work.unit not in moved and (headroom is None or headroom.fits(work.unit, target))
    ]
    left_s, unit, target = min(choices, default=(before, -1, -1))
    return (unit, source, target) if left_s < (1 - LEAST_GAIN) * before else None


def _carried_out(loads: Mapping[int, Load], unit: int, source: int, target: int) -> dict[int, Load]:
    """Return what the two ranks have left after a move; the price of the hand-over is the target's."""
    giver, taker = loads[source], loads[target]
    work = next(work for work in giver.works if work.unit == unit)
    there = replace(work, step_s=work.step_s * taker.slowness / giver.slowness)
    price_s = SET_UP_S + work.state_bytes / STATE_BYTES_PER_S
    return {
        source: replace(giver, works=tuple(other for other in giver.works if other != work)),
        target: replace(taker, works=(*taker.works, there), fixed_s=taker.fixed_s + price_s),
    }
