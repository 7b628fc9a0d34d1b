"""Whether a rank that has run dry should take a block over from the busiest rank: arithmetic alone. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from distill.planning.memory_model import Memory
from distill.planning.plan import Span

SET_UP_S = 0.1  # of a hand-over: two edges anew, one for the state, and a trainer to be made
STATE_BYTES_PER_S = 1e8  # at which a state travels; a little less than gigabit Ethernet carries
LEAST_GAIN = 0.1  # of the giver's remaining seconds: what a move must save, predictions being what they are


@dataclass(frozen=True)
class Work:
    """What is left of one block: its steps, seconds of one on the rank that has it, and bytes of its state."""

    block: int
    steps: int
    step_s: float
    state_bytes: int

    @property
    def seconds(self) -> float:
        return self.steps * self.step_s


@dataclass(frozen=True)
class Load:
    """What is left for one rank: blocks, and seconds that stay with it (rank 0's teacher). It takes `slowness` times as
    long as a usual rank; one that must run a stretch of the teacher for its blocks takes `pass_s` for each step of
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
    """Block `block` goes from rank `source` to rank `target`, which trains it from step `step` on. Moves of a stage are
    numbered in their order."""

    number: int
    block: int
    source: int
    target: int
    step: int


@dataclass(frozen=True)
class Room:
    """Memory for moves, in bytes: what every rank has `left`, and what a block takes, by the bounds that placements
    keep to. It only gets less: what finished blocks, and those that were given away, leave free is not counted on."""

    left: tuple[int, ...]
    on_target: tuple[int, ...]  # by block: where it is trained
    on_rank_0: tuple[int, ...]  # by block: its batches that wait while its state is on the way

    @staticmethod
    def of(memory: Memory | None, owners: Sequence[Collection[int]], *, backlog: int) -> Room | None:
        """Return the room beside the blocks that the ranks have by the plan, where up to `backlog` batches wait for a
        state; None where memory has no limit."""
        if memory is None or memory.limit is None:
            return None
        blocks = range(len(memory.student))
        rooms = [memory.room(sends=rank == 0) or 0 for rank in range(len(owners))]
        return Room(
            tuple(room - sum(map(memory.block, owned)) for room, owned in zip(rooms, owners, strict=True)),
            tuple(map(memory.block, blocks)),
            tuple(backlog * memory.activations([block]) for block in blocks),
        )

    @staticmethod
    def beside(memory: Memory, needed: Sequence[int]) -> Room | None:
        """Return the room beside the bytes that every rank needs by the plan, where a rank that takes a block runs the
        teacher for it; None where memory has no limit."""
        if memory.limit is None:
            return None
        blocks = range(len(memory.student))
        return Room(
            tuple(memory.limit - bytes_ for bytes_ in needed),
            tuple(memory.alone([block]) - memory.resident for block in blocks),
            (0,) * len(blocks),
        )

    def after(self, block: int, target: int) -> Room:
        """Return the room that a move leaves."""
        left = list(self.left)
        left[target] -= self.on_target[block]
        left[0] -= self.on_rank_0[block]
        return replace(self, left=tuple(left))

    def fits(self, block: int, target: int) -> bool:
        """Whether rank `target` and rank 0 have the room for a move of `block`."""
        left = self.after(block, target).left
        return left[target] >= 0 and left[0] >= 0


def expected_steps(span: Span, *, plateau: bool) -> int:
    """Return the steps that a block is expected to go on for. One that may stop at a plateau is expected to go on for
    as long as it has been trained: half of what has come to some age by chance is past half of its life."""
    return min(span.steps, span.first) if plateau else span.steps


def chosen_moves(
    loads: Mapping[int, Load], dry: Collection[int], room: Room | None = None
) -> list[tuple[int, int, int]]:
    """Return (block, source, target) of the moves to `dry` ranks, which have no blocks left, that are worth their price
    and fit in `room`, one after another.

    Each takes a block from the rank that is busiest by then and shortens what it and the target have left by at least
    LEAST_GAIN; no block is moved twice.
    """
    after, moves = dict(loads), list[tuple[int, int, int]]()
    while (move := _best_move(after, dry, room, moved={block for block, _, _ in moves})) is not None:
        moves.append(move)
        after |= _carried_out(after, *move)
        room = room and room.after(move[0], move[2])
    return moves


def _best_move(
    loads: Mapping[int, Load], dry: Collection[int], room: Room | None, moved: Collection[int]
) -> tuple[int, int, int] | None:
    source = max(loads, key=lambda rank: loads[rank].seconds)
    before = loads[source].seconds
    choices = [
        (max(load.seconds for load in _carried_out(loads, work.block, source, target).values()), work.block, target)
        for work in loads[source].works
        for target in dry
        if work.block not in moved and (room is None or room.fits(work.block, target))
    ]
    left_s, block, target = min(choices, default=(before, -1, -1))
    return (block, source, target) if left_s < (1 - LEAST_GAIN) * before else None


def _carried_out(loads: Mapping[int, Load], block: int, source: int, target: int) -> dict[int, Load]:
    """Return what the two ranks have left after a move; the price of the hand-over is the target's."""
    giver, taker = loads[source], loads[target]
    work = next(work for work in giver.works if work.block == block)
    there = replace(work, step_s=work.step_s * taker.slowness / giver.slowness)
    price_s = SET_UP_S + work.state_bytes / STATE_BYTES_PER_S
    return {
        source: replace(giver, works=tuple(other for other in giver.works if other != work)),
        target: replace(taker, works=(*taker.works, there), fixed_s=taker.fixed_s + price_s),
    }
