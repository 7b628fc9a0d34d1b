"""The best choice of candidates under budgets: a multiple-choice knapsack, solved exactly.

Every block gets one of its options, and an option may be for several blocks at once, which then have no other (such as
a narrower stream, which runs through all blocks of a stage). Losses and amounts are taken to add up. Source: Sinha,
Zoltners 1979, "The multiple-choice knapsack problem" (Operations Research 27); here with several budgets, by branch and
bound (HiGHS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

TINY = 1e-30
ROUNDING = 1e-12  # of sums of amounts, as a share
LARGEST_LOSS = 1e3  # what losses are scaled to: the solver stops when it is 1e-6 from the best
SOLVED, OUT_OF_TIME = 0, 1  # what milp() says
LIMIT_S = 60.0  # for one choice, which takes milliseconds where there are dozens of blocks with dozens of options


@dataclass(frozen=True)
class Option:
    """Something that the blocks `covers` may become, together: what is lost by it, and how much more than the teacher
    the network has of every amount with it (less: a negative number)."""

    name: str
    covers: frozenset[int]
    loss: float
    amounts: Mapping[str, float]
    trains: bool = True  # whether it has weights to train


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
    """Return the choice that loses least of those whose amounts add up to the limits at most; None where there is none.

    At least one of its options trains. At least `apart` blocks have something else than in each of `excluded`.
    """
    blocks = sorted(set().union(*(option.covers for option in options)))
    rules = [LinearConstraint(_covering(options, blocks), 1, 1)]
    rules.append(LinearConstraint(np.array([[float(option.trains) for option in options]]), 1, np.inf))
    for name, limit in limits.items():
        amounts = np.array([option.amounts[name] for option in options])
        scale = max(np.abs(amounts).max(), abs(limit), TINY)
        rules.append(LinearConstraint(amounts[None] / scale, -np.inf, limit / scale))
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


def _another(options: Sequence[Option], taken: Sequence[int], apart: int) -> LinearConstraint:
    """Return the rule that some blocks, so many at least, have something else than these options."""
    row = np.zeros(len(options))
    row[list(taken)] = [len(options[number].covers) for number in taken]
    return LinearConstraint(row[None], 0, row.sum() - apart)


def _covering(options: Sequence[Option], blocks: Sequence[int]) -> csr_array:
    row_of = {block: row for row, block in enumerate(blocks)}
    entries = [(row_of[block], column) for column, option in enumerate(options) for block in option.covers]
    rows, columns = zip(*entries, strict=True)
    return csr_array((np.ones(len(entries)), (rows, columns)), shape=(len(blocks), len(options)))


def totals(options: Sequence[Option], taken: Sequence[int]) -> tuple[float, dict[str, float]]:
    """Return what these of the options lose together, and their amounts."""
    chosen = [options[number] for number in taken]
    names = chosen[0].amounts if chosen else {}
    return sum(one.loss for one in chosen), {name: sum(one.amounts[name] for one in chosen) for name in names}


def choices(options: Sequence[Option], limits: Mapping[str, float], *, apart: int = 1) -> Iterator[Choice]:
    """Yield the best choice, then the best of those that differ from all before in at least `apart` blocks, and so on
    as long as there is one."""
    found: list[Choice] = []
    while (best := choose(options, limits, excluded=found, apart=apart)) is not None:
        found.append(best)
        yield best


def least(options: Sequence[Option], name: str) -> Choice:
    """Return the choice that has least of an amount, whatever it loses."""
    found = choose([replace(option, loss=option.amounts[name]) for option in options], {})
    assert found is not None, "every block has an option, and some option trains"
    loss, amounts = totals(options, found.options)
    return Choice(found.options, loss, amounts, found.proven)
