"""How far a placement can be from the best there is: a lower bound of the makespan by column generation, and placements
that are near it. No torch.

A rank's part of a placement is one of very many sets of blocks. With a worth for every block, a knapsack finds the set
of greatest worth that a rank can do within a makespan; where all ranks' greatest worths together are less than the
worth of all blocks, that makespan is impossible. A linear programme looks for the worths that prove most.
Source: Gilmore, Gomory 1961, for bins of one size; here ranks differ, and teacher ranks pay for what is sent (a
Lagrange multiplier `toll` on their seconds together). The programme's bound is nearly always the optimum itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distill.planning.packing import Floats, Packing

SEARCH_CELLS = 2**13  # cells of a knapsack while worths are looked for, about half a millisecond for 64 blocks
PROOF_CELLS = 2**17  # and where they are to prove something: rounding weakens the bound by cells times blocks of a rank
CERTAIN = 0.8  # parts with this share of the solution are decided at once
EFFORT = 45_000  # columns of all programmes solved, up to a second; not a time limit: plans are repeatable
RESTS = 4  # sets that are added at a time


@dataclass(frozen=True)
class Kind:
    """What ranks that are alike have in common."""

    slowness: float
    base_s: float
    wire: float  # seconds of the teacher ranks, together, for what is sent to it at price 1
    teaches: bool  # whether it is one of these where something is sent


class _Knapsack:
    """The greatest worth of the blocks that a rank can do, by seconds of slowness 1 in `cells` of equal length.

    Where blocks are rounded down to whole cells (`rounding` 0, not 0.5), every set that fits is counted as fitting.
    """

    def __init__(self, packing: Packing, *, longest_s: float, cells: int, rounding: float) -> None:
        self._packing, self._cells, self._rounding = packing, cells, rounding
        self.cell_s = longest_s / cells
        self._work, self._reach = self._in_cells(packing.work_s), self._in_cells(packing.reach_s)

    def _in_cells(self, seconds: Floats) -> NDArray[np.intp]:
        return np.floor(seconds / self.cell_s + self._rounding + 1e-9).astype(np.intp)

    def size(self, blocks: Sequence[int]) -> int:
        """Return the cells that a rank with these blocks needs."""
        chosen = list(blocks)
        return int(self._work[chosen].sum() + self._reach[chosen].max(initial=0))

    def capacity(self, kind: Kind, makespan_s: float) -> int:
        """Return the cells that a rank has for its blocks."""
        return min(int(np.floor((makespan_s - kind.base_s) / kind.slowness / self.cell_s + 1e-6)), self._cells)

    def fill(self, worth: Floats, toll: float, kind: Kind) -> Filled:
        """Return the greatest worth at every capacity, less the toll for what teacher ranks spend on them."""
        packing = self._packing
        gain = worth - toll * (kind.wire * packing.wire_s + (packing.work_s if kind.teaches else 0.0))
        saved = toll * kind.wire * packing.shared_s
        if packing.reaches or saved.any():
            return self._fill_in_order(gain, saved)
        best = np.zeros(self._cells + 1)
        taken = np.zeros((len(worth), self._cells + 1), bool)
        for block, size in enumerate(self._work):
            if gain[block] > 0 and size <= self._cells:
                more = best[: len(best) - size] + gain[block]
                np.greater(more, best[size:], out=taken[block, size:])
                np.maximum(best[size:], more, out=best[size:])
        return _FilledFreely(best, taken, self._work, int((gain > 0).sum()))

    def _fill_in_order(self, gain: Floats, saved: Floats) -> _FilledInOrder:
        """The same where it matters which block was taken last: `having` are the worths with it."""
        cells = self._cells + 1
        without, having = np.zeros(cells), np.full(cells, -np.inf)
        best, last = np.zeros(cells), np.full(cells, -1)
        goes_on, came_from = np.zeros((2, len(gain), cells), bool)
        for block, size in enumerate(self._work):
            np.greater(having + saved[block], without, out=goes_on[block])
            np.greater(having, without, out=came_from[block])
            taken = np.maximum(having + saved[block], without) + gain[block]
            without = np.maximum(having, without)
            having = np.full(cells, -np.inf)
            having[size:] = taken[: max(0, cells - size)]
            reach = min(cells, int(self._reach[block]))
            reached = having[: cells - reach]
            last[reach:][reached > best[reach:]] = block
            np.maximum(best[reach:], reached, out=best[reach:])
        return _FilledInOrder(best, last, goes_on, came_from, self._work, self._reach)


class Filled(Protocol):
    """A knapsack's answers: the greatest worth at every capacity, and which blocks have it."""

    @property
    def best(self) -> Floats:
        """The greatest worth at every capacity (cells + 1), never falling."""

    @property
    def effort(self) -> int:
        """What filling it cost, in the unit of EFFORT."""

    def blocks(self, capacity: int) -> list[int]:
        """Return the blocks of the greatest worth at a capacity."""


@dataclass(frozen=True)
class _FilledFreely:
    best: Floats
    taken: NDArray[np.bool_]  # (blocks, cells + 1)
    work: NDArray[np.intp]
    effort: int  # blocks of any worth

    def blocks(self, capacity: int) -> list[int]:
        found = []
        for block in range(len(self.work) - 1, -1, -1):
            if self.taken[block, capacity]:
                found.append(block)
                capacity -= int(self.work[block])
        return found[::-1]


@dataclass(frozen=True)
class _FilledInOrder:
    best: Floats
    last: NDArray[np.intp]  # the last block of the best set
    goes_on: NDArray[np.bool_]  # where a block is taken: whether the one before it is, too
    came_from: NDArray[np.bool_]  # where a block is left out: whether the one before it is taken
    work: NDArray[np.intp]
    reach: NDArray[np.intp]

    @property
    def effort(self) -> int:
        return 3 * len(self.work)

    def blocks(self, capacity: int) -> list[int]:
        found: list[int] = []
        last = int(self.last[capacity])
        if last < 0:
            return found
        cell, taken = capacity - int(self.reach[last]), True
        for block in range(last, -1, -1):
            if taken:
                found.append(block)
                cell -= int(self.work[block])
                taken = bool(self.goes_on[block, cell])
            else:
                taken = bool(self.came_from[block, cell])
        return found[::-1]


@dataclass
class _Open:
    """What a dive has not decided yet: blocks (N), the ranks of every kind, and the seconds of teacher ranks."""

    blocks: NDArray[np.bool_]
    ranks: dict[Kind, list[int]]
    charged_s: float = 0.0  # what the decided parts take of the teacher ranks' seconds


class LowerBound:
    """The bound of one problem, raised step by step, and placements that the same programme leads to.

    `reached_s` is a makespan that no placement beats.
    """

    def __init__(self, packing: Packing, owner: NDArray[np.intp], *, reached_s: float, tolerance: float) -> None:
        """`owner` (N), the rank of every block, is a known placement, `reached_s` a known bound."""
        upper_s = float(packing.seconds(owner).max())
        self._packing, self._upper_s, self._tolerance = packing, upper_s, tolerance
        self.reached_s = reached_s
        self._shares = np.zeros(0)  # of the columns in the programme's last solution
        kinds: dict[Kind, list[int]] = {}
        for rank in range(packing.num_ranks):
            teaches = packing.sends and rank < packing.teacher_ranks
            wire = packing.price[rank] * (1 - teaches / packing.teacher_ranks)
            kind = Kind(float(packing.slowness[rank]), float(packing.base_s[rank]), float(wire), teaches)
            kinds.setdefault(kind, []).append(rank)
        self._kinds = kinds
        longest_s = upper_s / float(packing.slowness.min())
        self._search = _Knapsack(packing, longest_s=longest_s, cells=SEARCH_CELLS, rounding=0.5)
        self._proof = _Knapsack(packing, longest_s=longest_s, cells=PROOF_CELLS, rounding=0.0)
        self._known: dict[tuple[Kind, tuple[int, ...]], Floats] = {}
        self._columns = self._known  # those that fit in the makespan looked at
        self._effort = 0
        for kind, ranks in kinds.items():
            for rank in ranks:
                self._add_column(kind, np.flatnonzero(owner == rank).tolist())

    @property
    def exhausted(self) -> bool:
        return self._effort >= EFFORT

    def close_in(self) -> None:
        """Raise the bound until it is within the tolerance of the known placement, or as far as it goes."""
        possible_s = self._upper_s  # the least makespan that is known, or that the programme does not exclude
        nearly = 1 + self._tolerance / 2
        first = [self._upper_s / nearly, self.reached_s * nearly]  # nearly always one of the two is the optimum
        while possible_s > self.reached_s * (1 + self._tolerance) and not self.exhausted:
            target_s = first.pop(0) if first else (self.reached_s + possible_s) / 2
            if not self._excludes(target_s, self._all_open()) or self.reached_s < target_s:
                possible_s = min(possible_s, target_s)

    def dive(self, target_s: float) -> NDArray[np.intp] | None:
        """Return the rank of every block (N), -1 for those that found none, in a placement of about `target_s`; None,
        and the bound is raised, where that is impossible.

        The likeliest parts of the programme's solution are given to ranks, then the programme is solved for the rest.
        """
        left = self._all_open()
        if self._excludes(target_s, left):
            return None
        owner = np.full(self._packing.num_blocks, -1)
        while not self.exhausted:
            self._decide(owner, left, certain=CERTAIN)
            if not left.blocks.any() or self._generate(target_s, left) is not None:
                break
        return owner

    def likely(self) -> NDArray[np.intp]:
        """Return the rank of every block (N), -1 for those that found none, by the programme's last solution."""
        owner = np.full(self._packing.num_blocks, -1)
        if len(self._shares):
            self._decide(owner, self._all_open(), certain=1e-6)
        return owner

    def _excludes(self, target_s: float, everything: _Open) -> bool:
        """Return whether `target_s` is impossible as far as the programme can tell; raises the bound where it is."""
        self._add_rests(self._packing.work_s, 0.0, target_s)
        worths = self._generate(target_s, everything)
        if worths is None:
            return False
        self.reached_s = max(self.reached_s, self._proven(*worths, everything))
        return True

    def _all_open(self) -> _Open:
        return _Open(
            np.ones(self._packing.num_blocks, bool), {kind: list(ranks) for kind, ranks in self._kinds.items()}
        )

    def _decide(self, owner: NDArray[np.intp], left: _Open, *, certain: float) -> None:
        """Give the likeliest parts that go together to ranks: one, and any others that are as `certain`."""
        keys = list(self._columns)
        for count, index in enumerate(np.argsort(-self._shares, kind="stable")):
            kind, blocks = keys[index]
            if count and self._shares[index] < certain:
                break
            part = [block for block in blocks if left.blocks[block]]
            if left.ranks[kind] and (len(part) == len(blocks) or not count):
                owner[part] = left.ranks[kind].pop(0)
                left.blocks[part] = False
                left.charged_s += self._charge(kind, part)

    def _generate(self, target_s: float, left: _Open) -> tuple[Floats, float] | None:
        """Return worths and a toll that show `target_s` to be impossible for what is open; None if there are none."""
        self._columns = {key: row for key, row in self._known.items() if self._fits(*key, target_s)}
        value, worth, toll, gains = self._solve(target_s, left)
        while value > 1e-9 and not self.exhausted:
            wanted = np.where(left.blocks, worth, -np.inf)
            fills = self._fills(self._search, wanted, toll)
            if self._all_worths(self._search, fills, toll, target_s, left) < worth.sum() * (1 - 1e-9):
                return worth, toll
            if not self._add_columns(fills, worth, toll, target_s, gains):
                return None
            self._add_rests(wanted, toll, target_s)
            value, worth, toll, gains = self._solve(target_s, left)
        return None

    def _fits(self, kind: Kind, blocks: tuple[int, ...], target_s: float) -> bool:
        return self._search.size(blocks) <= self._search.capacity(kind, target_s)

    def _fills(self, knapsack: _Knapsack, worth: Floats, toll: float) -> dict[Kind, Filled]:
        """Return every kind's greatest worths; kinds that differ in speed and base alone share them."""
        made: dict[tuple[bool, float], Filled] = {}
        for kind in self._kinds:
            if (kind.teaches, kind.wire) not in made:
                made[kind.teaches, kind.wire] = knapsack.fill(worth, toll, kind)
                self._effort += made[kind.teaches, kind.wire].effort
        return {kind: made[kind.teaches, kind.wire] for kind in self._kinds}

    def _all_worths(
        self, knapsack: _Knapsack, fills: Mapping[Kind, Filled], toll: float, makespan_s: float, left: _Open
    ) -> float:
        """Return the greatest worth that all open ranks can do within a makespan."""
        total = toll * (self._time_of_teachers(makespan_s) - left.charged_s)
        for kind, ranks in left.ranks.items():
            total += len(ranks) * float(fills[kind].best[knapsack.capacity(kind, makespan_s)])
        return total

    def _time_of_teachers(self, makespan_s: float) -> float:
        """Return the seconds (slowness 1) that all teacher ranks have for students and for sending."""
        packing, teachers = self._packing, slice(self._packing.teacher_ranks)
        return float(((makespan_s - packing.base_s[teachers]) / packing.slowness[teachers]).sum())

    def _proven(self, worth: Floats, toll: float, everything: _Open) -> float:
        """Return the longest makespan that these worths show to be impossible."""
        fills = self._fills(self._proof, worth, toll)
        low, high = self.reached_s, self._upper_s
        for _ in range(30):
            middle = (low + high) / 2
            if self._all_worths(self._proof, fills, toll, middle, everything) < worth.sum() * (1 - 1e-9):
                low = middle
            else:
                high = middle
        return low

    def _add_columns(
        self, fills: Mapping[Kind, Filled], worth: Floats, toll: float, target_s: float, gains: Mapping[Kind, float]
    ) -> bool:
        """Add the best set of every kind of rank that is worth more than the programme believes; return whether any."""
        before = len(self._columns)
        for kind in self._kinds:
            blocks = fills[kind].blocks(self._search.capacity(kind, target_s))
            if self._gain(kind, blocks, worth, toll) > gains[kind] + 1e-9:
                self._add_column(kind, blocks)
        return len(self._columns) > before

    def _add_rests(self, worth: Floats, toll: float, target_s: float) -> None:
        """Add for the most frequent kind the best set, the best of what that leaves over, and so on: that saves
        rounds."""
        kind = max(self._kinds, key=lambda one: len(self._kinds[one]))
        capacity, left = self._search.capacity(kind, target_s), worth
        for _ in range(min(RESTS, len(self._kinds[kind]))):
            filled = self._search.fill(left, toll, kind)
            self._effort += filled.effort
            blocks = filled.blocks(capacity)
            self._add_column(kind, blocks)
            left = left.copy()
            left[blocks] = -np.inf

    def _gain(self, kind: Kind, blocks: Sequence[int], worth: Floats, toll: float) -> float:
        return float(worth[list(blocks)].sum()) - toll * self._charge(kind, blocks)

    def _charge(self, kind: Kind, blocks: Sequence[int]) -> float:
        """Return the seconds (slowness 1) of teacher ranks that these blocks cost on a rank of this kind."""
        if not self._packing.sends:
            return 0.0
        chosen = np.zeros((1, self._packing.num_blocks))
        chosen[0, list(blocks)] = 1
        own = float(self._packing.own_s(chosen)[0]) if kind.teaches else 0.0
        return own + kind.wire * float(self._packing.sent_s(chosen)[0])

    def _add_column(self, kind: Kind, blocks: Sequence[int]) -> None:
        """Add a constraint on (worths, the kinds' gains, toll): this set gains no more than its kind is said to."""
        number = self._packing.num_blocks
        row = np.zeros(number + len(self._kinds) + 1)
        row[list(blocks)] = 1
        row[number + list(self._kinds).index(kind)] = -1
        row[-1] = -self._charge(kind, blocks)
        self._known[kind, tuple(blocks)] = self._columns[kind, tuple(blocks)] = row

    def _solve(self, target_s: float, left: _Open) -> tuple[float, Floats, float, dict[Kind, float]]:
        """Return by how much the worth of all blocks, which is 1, exceeds what the known sets can gain, and the worths,
        the toll and the kinds' gains that make the most of it."""
        from scipy.optimize import linprog  # here: importing it takes half a second, and few plans need it

        number, counts = self._packing.num_blocks, [len(ranks) for ranks in left.ranks.values()]
        self._effort += len(self._columns)
        time_s = self._time_of_teachers(target_s) - left.charged_s
        objective = np.concatenate([-left.blocks.astype(float), counts, [time_s]])
        rows = np.stack([np.concatenate([np.ones(number), np.zeros(len(counts) + 1)]), *self._columns.values()])
        limits = np.zeros(len(rows))
        limits[0] = 1
        bounds = [(0, None if is_open else 0) for is_open in left.blocks] + [(0, None)] * len(counts)
        bounds += [(0, None if self._packing.sends else 0)]
        solved = linprog(objective, A_ub=rows, b_ub=limits, bounds=bounds, method="highs")
        self._shares = -solved.ineqlin.marginals[1:]
        return (
            -solved.fun,
            solved.x[:number],
            float(solved.x[-1]),
            dict(zip(self._kinds, solved.x[number:-1], strict=True)),
        )
