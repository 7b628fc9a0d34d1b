"""What every strategy says of itself, and that the words of plan.strategy are those of the registry."""

from __future__ import annotations

import pytest

from distill.config.choices import Strategy as Choice
from distill.planning.costs import Costs, Span
from distill.planning.plan import STRATEGIES, Source, Strategy

COSTS = Costs((1.0, 2.0), (3.0, 4.0), (10, 10, 10), batch_size=8)
SPANS = (Span(0, 0, 5), Span(1, 0, 5))


def test_the_choices_are_those_that_a_user_may_name_and_auto() -> None:
    internal = {"groups", "cached"}  # plan.groups and teacher.cache ask for them
    assert {choice.name for choice in Choice} == set(STRATEGIES) - internal | {"auto"}
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=lambda one: one.name)
def test_a_strategy_plans_every_unit_once_and_answers_for_its_plans(strategy: Strategy) -> None:
    plan = strategy.plan(COSTS, SPANS, 2)
    assert sorted(unit for owned in plan.owners for unit in owned) == [0, 1]
    assert plan.label.startswith(plan.strategy)
    teaching = [rank for rank in range(2) if plan.teaches(rank)]
    assert bool(teaching) == (strategy.source is not Source.recorded)
    for flow in plan.how.flows(plan, COSTS):
        assert flow.source in teaching
        assert flow.target != flow.source
    for rank in range(2):
        assert plan.taught_elsewhere(rank) <= {0, 1} - set(plan.owners[rank])


def test_some_are_chosen_from_and_all_others_are_named() -> None:
    assert {name for name, one in STRATEGIES.items() if one.automatic} == {"broadcast", "relay", "replicate"}
    assert {name for name, one in STRATEGIES.items() if one.shares_batches} == {"groups", "ddp"}
