"""The best choice of candidates under budgets: a multiple-choice knapsack, solved exactly.

Every block gets one of its options, and an option may be for several blocks at once, which then have no other (such as
a narrower stream, which runs through all blocks of a stage). Losses and amounts are taken to add up. Source: Sinha,
Zoltners 1979, "The multiple-choice knapsack problem" (Operations Research 27); here with several budgets, by branch and
bound (HiGHS).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # where it is used it is imported: that takes half a second, and jobs without a search use none
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

TINY = 1e-30
ROUNDING = 1e-12  # of sums of amounts, as a share
LARGEST_LOSS = 1e3  # what losses are scaled to: the solver stops when it is 1e-6 from the best
SOLVED, OUT_OF_TIME = 0, 1  # what milp() says
LIMIT_S = 60.0  # for one choice, which takes milliseconds where there are dozens of blocks with dozens of options


@dataclass(frozen=True)
class Option:
    """Something that the blocks `covers` may become, together: what is lost by it, and how much more than the teacher
    the network has of every amount with it (less: a negative number). Of amounts in `peaks` a choice has, besides the
    sum, the highest of its options' peaks: memory is weights and the most that is alive at once."""

    name: str
    covers: frozenset[int]
    loss: float
    amounts: Mapping[str, float]
    trains: bool = True  # whether it has weights to train
    peaks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Options by their numbers, each block covered once; `proven`: that none within the limits loses less."""

    options: tuple[int, ...]
    loss: float
    amounts: Mapping[str, float]
    proven: bool


def choose(
    options: Sequence[Option], limits: Mapping[str, float], *, excluded: Sequence[Choice] = (), apart: int = 1
) -> Choice | None:
    """Return the choice that loses least of those whose amounts are within the limits; None where there is none.

    At least one of its options trains. At least `apart` blocks have something else than in each of `excluded`.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    blocks = blocks_of(options)
    covering = _covering(options, blocks)
    rules = [LinearConstraint(covering, 1, 1)]
    rules.append(LinearConstraint(np.array([[float(option.trains) for option in options]]), 1, np.inf))
    rules += [_within(options, covering, name, limit) for name, limit in limits.items()]
    rules += [_another(options, other.options, apart) for other in excluded]
    losses = np.array([option.loss for option in options])
    while True:
        found = milp(
            losses * (LARGEST_LOSS / max(np.abs(losses).max(), TINY)),
            constraints=rules,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": LIMIT_S},
        )
        if found.status not in (SOLVED, OUT_OF_TIME) or found.x is None:
            return None
        taken = tuple(int(number) for number in np.flatnonzero(found.x > 0.5))
        choice = Choice(taken, *totals(options, taken), proven=found.status == SOLVED)
        if all(choice.amounts[name] <= limit + ROUNDING * abs(limit) for name, limit in limits.items()):
            return choice
        rules.append(_another(options, taken, 1))  # over a limit by less than the solver's tolerance


def _within(options: Sequence[Option], covering: csr_array, name: str, limit: float) -> LinearConstraint:
    """Return the rule that a sum of amounts, with the peak of whichever block it is, keeps to a limit. A block has one
    option, so the sum of the peaks of its options that are taken is that one's."""
    from scipy.optimize import LinearConstraint

    rows = np.array([[option.amounts[name] for option in options]])
    if any(name in option.peaks for option in options):
        rows = rows + covering.toarray() * np.array([option.peaks[name] for option in options])
    scale = max(np.abs(rows).max(), abs(limit), TINY)
    return LinearConstraint(rows / scale, -np.inf, limit / scale)


def _another(options: Sequence[Option], taken: Sequence[int], apart: int) -> LinearConstraint:
    """Return the rule that some blocks, so many at least, have something else than these options."""
    from scipy.optimize import LinearConstraint

    row = np.zeros(len(options))
    row[list(taken)] = [len(options[number].covers) for number in taken]
    return LinearConstraint(row[None], 0, row.sum() - apart)


def _covering(options: Sequence[Option], blocks: Sequence[int]) -> csr_array:
    from scipy.sparse import csr_array

    row_of = {block: row for row, block in enumerate(blocks)}
    entries = [(row_of[block], column) for column, option in enumerate(options) for block in option.covers]
    rows, columns = zip(*entries, strict=True)
    return csr_array((np.ones(len(entries)), (rows, columns)), shape=(len(blocks), len(options)))


def totals(options: Sequence[Option], taken: Sequence[int]) -> tuple[float, dict[str, float]]:
    """Return what these of the options lose together, and their amounts."""
    chosen = [options[number] for number in taken]
    names = chosen[0].amounts if chosen else {}
    peaks = {name: max((one.peaks[name] for one in chosen if name in one.peaks), default=0.0) for name in names}
    return sum(one.loss for one in chosen), {
        name: sum(one.amounts[name] for one in chosen) + peaks[name] for name in names
    }


def choices(options: Sequence[Option], limits: Mapping[str, float], *, apart: int = 1) -> Iterator[Choice]:
    """Yield the best choice, then the best of those that differ from all before in at least `apart` blocks, and so on
    as long as there is one."""
    found: list[Choice] = []
    while (best := choose(options, limits, excluded=found, apart=apart)) is not None:
        found.append(best)
        yield best


def least(options: Sequence[Option], name: str) -> Choice:
    """Return the choice that has least of an amount, whatever it loses."""
    found = []
    for peak in sorted({option.peaks.get(name, 0.0) for option in options}):
        # The sum is least where peaks may be high; the least of both together lies at one of the peaks.
        numbers = [number for number, option in enumerate(options) if option.peaks.get(name, 0.0) <= peak]
        few = [replace(options[number], loss=options[number].amounts[name]) for number in numbers]
        if blocks_of(few) == blocks_of(options) and (best := choose(few, {})) is not None:
            taken = tuple(numbers[number] for number in best.options)
            found.append(Choice(taken, *totals(options, taken), best.proven))
    assert found, "every block has an option, and some option trains"
    return min(found, key=lambda choice: choice.amounts[name])


def blocks_of(options: Iterable[Option]) -> list[int]:
    """Return the blocks for which there are options."""
    return sorted(set().union(*(option.covers for option in options)))
