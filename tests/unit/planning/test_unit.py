"""Units: their numbers, names and keys."""

from __future__ import annotations

from distill.planning.costs import Span
from distill.planning.unit import Proposal, Unit, number_units

NAMES = ["stem", "one", "two"]


def test_the_only_candidate_of_a_block_has_its_number_name_and_key() -> None:
    units = number_units([Proposal("separable", 1, 2), Proposal("lowrank", 2, 3)], NAMES)
    assert units == [Unit(1, "one", 1, 2, "1"), Unit(2, "two", 2, 3, "2")]


def test_further_candidates_and_students_of_several_blocks_are_numbered_behind_the_blocks() -> None:
    proposals = [Proposal("a", 1, 2), Proposal("b", 1, 2), Proposal("c", 0, 2), Proposal("a", 2, 3)]
    units = number_units(proposals, NAMES)
    assert [(unit.number, unit.name, unit.input, unit.target) for unit in units] == [
        (1, "one", 1, 2), (3, "one:b", 1, 2), (4, "stem..one:c", 0, 2), (2, "two", 2, 3),
    ]  # fmt: skip


def test_what_first_weights_are_drawn_for_depends_on_no_other_candidate() -> None:
    alone = number_units([Proposal("a", 1, 2), Proposal("b", 1, 2)], NAMES)
    beside = number_units([Proposal("a", 0, 1), Proposal("a", 1, 2), Proposal("x", 1, 2), Proposal("b", 1, 2)], NAMES)
    assert {unit.name: unit.key for unit in alone}.items() <= {unit.name: unit.key for unit in beside}.items()


def test_a_span_has_the_boundaries_of_its_unit_else_those_of_the_block_of_its_number() -> None:
    assert Span.of(Unit(7, "x", 2, 5, "x"), 3, 9) == Span(7, 3, 9, 2, 5)
    assert Span(4, 0, 9) == Span(4, 0, 9, 4, 5)
