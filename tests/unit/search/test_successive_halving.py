"""Who stays in training: by what the best student with a candidate loses."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.search.choice import Option
from distill.search.halving import ends, halved, regrets

A, B = frozenset({0}), frozenset({1})


def option(name: str, covers: frozenset[int], loss: float, params: float, *, trains: bool = True) -> Option:
    return Option(name, covers, loss, {"params": params}, trains=trains)


# Two blocks of 100 parameters each, of which 100 in all may stay: every size has a place at some budget.
TABLE = [
    option("large", A, 0.1, -20),
    option("half", A, 0.2, -50),
    option("worse half", A, 0.5, -50),
    option("small", A, 0.4, -80),
    option("small", B, 3.0, -80),
    option("half", B, 1.0, -50),
    option("skip", B, 9.0, -100, trains=False),
    option("keep", A, 0.0, 0, trains=False),
    option("keep", B, 0.0, 0, trains=False),
]


def test_a_regret_is_what_the_best_student_with_a_candidate_loses_more() -> None:
    found = regrets(TABLE, range(6), {"params": -100.0})
    # the best are half and half: 1.2; large of A leaves 80 to be saved in B
    assert found == pytest.approx({0: 1.9, 1: 0.0, 2: 0.3, 3: 0.2, 4: 1.9, 5: 0.0})


def test_who_stays_follows_the_budget() -> None:
    assert halved(TABLE, regrets(TABLE, range(4), {"params": -20.0})) == [0, 1]
    assert halved(TABLE, regrets(TABLE, range(4), {"params": -150.0})) == [1, 3], "though another loses less by itself"


def test_half_of_every_block_stays_and_of_an_odd_number_one_more() -> None:
    assert halved(TABLE, {0: 0.3, 1: 0.2, 2: 0.1, 4: 5.0, 5: 4.0}) == [1, 2, 5]
    assert halved(TABLE, {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1}) == [0, 1], "of equals the first"
    assert halved(TABLE, {5: 7.0}) == [5]
    assert halved(TABLE, {}) == []


def test_what_no_student_within_the_budgets_can_have_does_not_stay() -> None:
    found = regrets(TABLE, range(6), {"params": -170.0})
    assert found == {0: inf, 1: inf, 2: inf, 3: 0.0, 4: inf, 5: inf}
    assert halved(TABLE, found) == [3]
    assert set(regrets(TABLE, range(6), {"params": -500.0}).values()) == {inf}


def test_options_for_several_blocks_compete_among_themselves() -> None:
    both = [*TABLE, option("narrow", A | B, 1.1, -110), option("narrower", A | B, 1.5, -150)]
    found = regrets(both, [0, 1, 9, 10], {"params": -100.0})
    assert found[9] == 0.0
    assert found[10] == pytest.approx(0.4)
    assert halved(both, found) == [1, 9]


@given(st.integers(4, 10_000))
def test_every_round_ends_at_twice_the_step_of_the_one_before(steps: int) -> None:
    first, second, third = ends(steps)
    assert 1 <= first < second < third == steps
    assert steps - 3 <= 4 * first <= 2 * second <= steps
