"""First weights of layers with very many inputs: by a sketch that holds all variance, those of the covariance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distill.profiling.sketch import Sketch
from distill.profiling.statistics import InputStatistics, gather
from distill.recipes import LowRank, Recipe, Separable, replace_layers
from distill.recipes.channels import inner_groups
from distill.recipes.thin_start import choose

X = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(0)).cumsum(2)


def block() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, bias=False), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers).eval()


def seen(network: nn.Sequential) -> dict[str, InputStatistics]:
    return gather({"2": network[2]}, [X], network, {"3": network[3]})


def both(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, InputStatistics], dict[str, InputStatistics]]:
    """What is known of the second layer with its covariance, and with a sketch instead."""
    whole = seen(block())
    monkeypatch.setattr("distill.profiling.statistics.WIDEST", 1)
    monkeypatch.setattr("distill.profiling.statistics.OF_WIDE", 10_000)
    sketched = seen(block())
    assert isinstance(sketched["2"].covariance, Sketch)
    assert sketched["2"].norm == "3"
    return whole, sketched


RECIPES = [LowRank(ratio=0.3, align=1, form=form) for form in ("channel", "spatial")] + [Separable(rank=2)]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_replacements_begin_with_the_same_weights(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    for statistics in both(monkeypatch):
        network = block()
        replace_layers(network, {"2": recipe}, torch.Generator().manual_seed(0), statistics)  # type: ignore[dict-item]
        given.append(network(X))
    off: Tensor = (given[0] - given[1]).norm() / given[0].norm()
    assert off < 1e-3


def test_the_same_channels_stay_and_others_are_repaired_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.recipes.wide_surgeon.ROUNDS", 12)
    kept, given = [], []
    for statistics in both(monkeypatch):
        network = block()
        groups = [replace(group, kept=5) for group in inner_groups(network, X)[0]]
        kept.append(choose(network, groups, statistics)[0].tolist())
        given.append(network(X))
    assert kept[0] == kept[1]
    torch.testing.assert_close(*given, rtol=1e-3, atol=1e-3)
