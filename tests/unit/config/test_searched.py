"""The settings of a search: what is refused, and what tells two of them apart."""

from __future__ import annotations

import pytest

from distill.config.compose import compose
from distill.config.fingerprint import identity
from distill.config.load import from_yaml, to_yaml
from distill.errors import ConfigError
from distill.launch.command import spread

BUDGET = "search.budget.params=0.5"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["search.budget.params=half"], r"search\.budget\.params: got 'half'; expected a share"),
        (["search.candidates=[thin]"], r"search\.candidates\[0\]: got 'thin'; expected a mapping"),
        (["search.candidates=[{ratio: 0.5}]"], r"search\.candidates\[0\]: "),
        (["search.candidates=[{recipe: thn}]"], r"search\.candidates\[0\]\.recipe: got 'thn'; expected 'thin'"),
        (["search.candidates=[{recipe: thin, blocks: 3}]"], r"search\.candidates\[0\]\.blocks: got 3"),
        (["search.sweep=params"], r"search\.budgets: got \[\]"),
        (["search.budgets=[0.5]"], r"search\.sweep: got None; expected one of params"),
        (["search.sweep=parms", "search.budgets=[0.5]"], r"search\.sweep: got 'parms'; expected 'params'"),
        ([BUDGET, "search.sweep=params", "search.budgets=[0.5]"], r"search\.budget\.params: got 0\.5; expected null"),
        ([BUDGET, "student.options.ratio=0.5"], r"student\.options: .* say it in search\.candidates"),
        ([BUDGET, "student.per_block={a: {recipe: keep}}"], r"student\.per_block: .* say it in search\.candidates"),
        ([BUDGET, "data.validation_fraction=0"], r"data\.validation_fraction: got 0\.0"),
        (["search.judged=0"], r"search\.judged: got 0"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_its_setting(settings: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(settings)


def test_a_search_is_read_back_as_it_was_asked_for() -> None:
    config = compose(["search.budget.bytes=500kB", BUDGET, "search.candidates=[{recipe: thin, ratio: 0.5}]"])
    assert config.search.on
    assert from_yaml(to_yaml(config)) == config


def test_what_is_chosen_is_told_apart_by_budgets_and_candidates_and_not_by_the_recipe_that_is_not_used() -> None:
    usual = identity(compose([]))
    assert not any(key.startswith(("search.", "deploy.")) for key in usual)
    one = identity(compose([BUDGET]))
    assert one == identity(compose([BUDGET, "student=separable", "student.rank=4"]))
    others = ["search.budget.params=0.4", "search.images=9", "search.candidates=[{recipe: thin}]", "search.judged=1"]
    assert all(identity(compose([BUDGET, other])) != one for other in others)
    assert identity(compose([BUDGET, "deploy.batch=1"])) == one
    held = [BUDGET, "search.budget.memory=0.5"]
    assert identity(compose([*held, "deploy.batch=1"])) != identity(compose(held))
    assert identity(compose([*held, "deploy.threads=2"])) == identity(compose(held))
    timed = [BUDGET, "search.budget.latency=0.5"]
    assert identity(compose([*timed, "deploy.batch=1"])) != identity(compose(timed))
    assert identity(compose([*timed, "deploy.programs=[]", "deploy.packed=int8"])) == identity(compose(timed))


def test_a_candidate_from_outside_counts_by_its_source() -> None:
    found = identity(compose([BUDGET, "search.candidates=[{recipe: 'tests.shortcut:Shortcut'}]"]))
    assert "search.candidates[0].recipe (source)" in found


def test_several_budgets_become_a_sweep_of_one() -> None:
    search = compose(["search.sweep=params", "search.budgets=[0.3,100k]"]).search
    assert spread(search) == ["search.budget.params=0.3,'100k'", "search.sweep=null", "search.budgets=[]"]
