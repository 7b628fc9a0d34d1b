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

import numpy as np
from numpy.typing import NDArray

from distill.planning.placement.knapsack import Filled, Kind, Knapsack
from distill.planning.placement.packing import Floats, Packing

SEARCH_CELLS = 2**13  # cells of a knapsack while worths are looked for, about half a millisecond for 64 blocks
PROOF_CELLS = 2**17  # and where they are to prove something: rounding weakens the bound by cells times blocks of a rank
CERTAIN = 0.8  # parts with this share of the solution are decided at once
EFFORT = 45_000  # columns of all programmes solved, up to a second; not a time limit: plans are repeatable
RESTS = 4  # sets that are added at a time


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
        self._search = Knapsack(packing, longest_s=longest_s, cells=SEARCH_CELLS, rounding=0.5)
        self._proof = Knapsack(packing, longest_s=longest_s, cells=PROOF_CELLS, rounding=0.0)
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
            overdrawn = left.charged_s > self._time_of_teachers(target_s)  # rounded, likely parts may ask for too much
            if not left.blocks.any() or overdrawn or self._generate(target_s, left) is not None:
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

    def _fills(self, knapsack: Knapsack, worth: Floats, toll: float) -> dict[Kind, Filled]:
        """Return every kind's greatest worths; kinds that differ in speed and base alone share them."""
        made: dict[tuple[bool, float], Filled] = {}
        for kind in self._kinds:
            if (kind.teaches, kind.wire) not in made:
                made[kind.teaches, kind.wire] = knapsack.fill(worth, toll, kind)
                self._effort += made[kind.teaches, kind.wire].effort
        return {kind: made[kind.teaches, kind.wire] for kind in self._kinds}

    def _all_worths(
        self, knapsack: Knapsack, fills: Mapping[Kind, Filled], toll: float, makespan_s: float, left: _Open
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
