"""The section on what was chosen under budgets."""

from __future__ import annotations

from typing import Any

import pytest

from distill.reporting.search import search_section

CANDIDATES = [
    {"block": "a", "candidate": "skip", "params": -90.0, "error": 1.0, "divergence": 0.5},
    {"block": "a", "candidate": "thin ratio=0.5", "params": -50.0, "error": 0.1, "divergence": 0.02},
    {"block": "a..b<", "blocks": ["a", "b<"], "candidate": "stream", "params": -99.0, "error": 0.2, "divergence": 0.04},
    {"block": "b<", "candidate": "skip", "params": -9.0, "error": 0.3, "divergence": None},
]
BUDGET = {
    "budget": {"params": {"asked": "1k", "limit": 1000.0}},
    "chosen": {"a": "thin ratio=0.5", "b<": "keep"},
    "predicted": {"params": 950.0, "divergence": 0.02},
    "measured": {"params": 950},
    "judged": [{"predicted": {"divergence": 0.02}, "divergence": 0.03, "top1": 88.5}],
    "delivered": 0,
}


def section(**changes: Any) -> str:
    search = {"budgets": [BUDGET | changes], "candidates": CANDIDATES, "teacher": {"params": 1000.0}}
    return search_section({"search": search})


def test_it_says_what_was_asked_for_chosen_predicted_and_measured() -> None:
    page = section()
    for words in ("1k", "1,000", "950", "thin ratio=0.5", "b&lt;", "goes on", "88.50 %", "4 candidates"):
        assert words in page
    assert page.count("<circle") == 3, "one that has no divergence has no place"
    assert page.count('<circle class="run"') == 1
    assert "5.0 % less, divergence 0.02" in page


def test_candidates_that_were_trained_tell_how_they_began() -> None:
    assert "before training" not in section()
    trained = {"trained_steps": 16, "before": {"divergence": 0.0725}, "dropped": {"stage": "halving_3", "why": "it is"}}
    search = {"budgets": [BUDGET], "candidates": [CANDIDATES[0] | trained, *CANDIDATES[1:]], "teacher": {"params": 9.0}}
    page = search_section({"search": search})
    for words in ("before training", "0.0725", "16", "halving_3"):
        assert words in page


def test_a_candidate_for_several_blocks_is_chosen_in_all_of_them() -> None:
    page = section(chosen={"a": "stream", "b<": "stream"})
    assert page.count('<circle class="run"') == 1
    assert page.count("0.04") == 4, "of both blocks, of its point, and among all candidates"
    assert section(chosen={"a": "stream", "b<": "skip"}).count('<circle class="run"') == 0


@pytest.mark.parametrize("metrics", [{}, {"search": None}, {"search": {}}, {"search": {"budgets": [{}]}}])
def test_what_is_missing_is_left_out(metrics: dict[str, Any]) -> None:
    assert "None" not in search_section(metrics)
    assert search_section({}) == ""
