"""The exact choice against trying everything."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.search.choice import Choice, Option, choices, choose, least, totals

NAMES = ("params", "flops", "memory")  # of which the last one has peaks


def tried(options: list[Option], limits: dict[str, float]) -> list[tuple[float, tuple[int, ...]]]:
    """Every choice within the limits with its loss, the best first."""
    blocks = set().union(*(option.covers for option in options))
    found = []
    for taken in chain.from_iterable(combinations(range(len(options)), n) for n in range(1, len(blocks) + 1)):
        covered = [block for number in taken for block in options[number].covers]
        loss, amounts = totals(options, taken)
        trains = any(options[number].trains for number in taken)
        within = all(amounts[name] <= limit + 1e-9 for name, limit in limits.items())
        if sorted(covered) == sorted(blocks) and trains and within:
            found.append((loss, taken))
    return sorted(found)


@st.composite
def pools(draw: st.DrawFn) -> list[Option]:
    """Three blocks with up to three options each, one of which leaves it as it is, and options for several blocks."""
    places = [frozenset({block}) for block in range(3)]
    peaks = draw(st.lists(st.integers(0, 100), min_size=9, max_size=9))
    none = dict.fromkeys(NAMES, 0.0)
    options = [Option("keep", place, 0.0, none, trains=False, peaks={"memory": peaks.pop()}) for place in places]
    extra = draw(st.lists(st.sampled_from([*places, *places, frozenset({0, 1}), frozenset({1, 2})]), max_size=6))
    for number, place in enumerate(extra):
        amounts = {name: -float(draw(st.integers(0, 100))) for name in NAMES}
        loss = draw(st.integers(1, 1000)) / 1000
        high = {"memory": peaks.pop()}
        options.append(Option(f"{number}", place, loss, amounts, trains=draw(st.booleans()), peaks=high))
    return options


@settings(deadline=None)
@given(pools(), st.integers(-250, 0), st.integers(-250, 0), st.integers(-250, 100))
def test_it_is_the_best_of_all_there_are(options: list[Option], params: int, flops: int, memory: int) -> None:
    limits = {"params": float(params), "flops": float(flops), "memory": float(memory)}
    found, best = choose(options, limits), tried(options, limits)
    assert (found is None) == (not best)
    if found is not None:
        assert found.proven
        assert found.loss == pytest.approx(best[0][0], abs=1e-6)
        assert (found.loss, found.amounts) == totals(options, found.options)
        assert all(found.amounts[name] <= limits[name] + 1e-6 for name in limits)


@settings(deadline=None)
@given(pools())
def test_the_next_ones_come_in_order_and_none_twice(options: list[Option]) -> None:
    limits = {"params": -20.0}
    found = list(choices(options, limits))
    assert [one.loss for one in found] == pytest.approx([loss for loss, _ in tried(options, limits)], abs=1e-6)
    assert len({one.options for one in found}) == len(found)


@settings(deadline=None)
@given(pools())
def test_the_least_memory_is_that_of_the_best_of_all_there_are(options: list[Option]) -> None:
    if any(option.trains for option in options):
        there = [totals(options, taken)[1]["memory"] for _, taken in tried(options, {})]
        assert least(options, "memory").amounts["memory"] == min(there)


def of(block: int, name: str, loss: float, params: float) -> Option:
    return Option(name, frozenset({block}), loss, {"params": params})


def test_what_differs_in_few_places_is_left_out() -> None:
    options = [of(block, f"{n}", 0.1 * n, -10.0 * n) for block in range(3) for n in range(3)]
    found = list(choices(options, {"params": -20.0}, apart=2))
    assert len(found) > 1
    for one, other in combinations(found, 2):
        assert len(set(one.options) & set(other.options)) <= 1


def test_an_option_for_several_blocks_differs_in_all_of_them() -> None:
    wide = Option("wide", frozenset({0, 1, 2}), 0.0, {"params": -9.0})
    options = [wide, *(of(block, f"{n}", 1.0 + n, -3.0) for block in range(3) for n in range(2))]
    first, second = choose(options, {}), choose(options, {}, excluded=[Choice((0,), 0.0, {}, True)], apart=3)
    assert first is not None
    assert second is not None
    assert (first.options, second.options) == ((0,), (1, 3, 5))


def test_the_least_there_can_be_of_an_amount() -> None:
    options = [of(0, "small", 5.0, -10.0), of(0, "keep", 0.0, 0.0), of(1, "keep", 0.0, 0.0), of(1, "half", 1.0, -3.0)]
    assert least(options, "params") == Choice((0, 3), 6.0, {"params": -13.0}, proven=True)


def test_a_limit_is_kept_to_the_last_parameter() -> None:
    """The solver itself lets sums be a millionth larger."""
    options = [of(0, "over", 0.0, -9_999_999.0), of(0, "within", 1.0, -10_000_000.0), of(1, "keep", 0.0, 0.0)]
    found = choose(options, {"params": -10_000_000.0})
    assert found is not None
    assert found.amounts == {"params": -10_000_000.0}
