"""Optimal brain surgeon over channels against brute force: every choice by solving all least-squares problems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.recipes import surgeon
from distill.recipes.group import others
from distill.recipes.surgeon import Reader, regularized, remaining, repaired


def problem(seed: int, outputs: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, columns, generator=generator, dtype=torch.float64)
    mixed = rows @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    kernel = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    return kernel, regularized(mixed.T.cov())


def error(kernel: Tensor, covariance: Tensor, columns: Tensor) -> float:
    """What is lost at best where only these columns are left."""
    left = covariance[columns]
    rest = covariance - left.T @ torch.linalg.solve(left[:, columns], left)
    return float(((kernel @ rest) * kernel).sum())


def by_brute_force(problems: list[tuple[Tensor, Tensor, Tensor]], units: int, kept: int) -> list[int]:
    alive = list(range(units))
    while len(alive) > kept:

        def after(unit: int) -> float:
            left = torch.tensor([one for one in range(units) if one in alive and one != unit])
            return sum(error(a, c, others(len(c), reads[others(units, left)].flatten())) for a, c, reads in problems)

        alive.remove(min(alive, key=after))
    return alive


@pytest.mark.parametrize("delayed", [1, 4, 256])
@pytest.mark.parametrize(("units", "size", "outputs"), [(8, 1, 3), (6, 4, 5), (5, 3, 20)])
def test_every_removal_is_the_one_that_costs_least(
    units: int, size: int, outputs: int, delayed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgeon, "DELAYED", delayed)
    reads = torch.arange(units * size).view(units, size) + 2  # the first two columns are no unit's
    problems = [(*problem(seed, outputs, units * size + 2), reads) for seed in (1, 2)]
    for kept in range(1, units):
        readers = [Reader(*one, rest=torch.arange(2)) for one in problems]
        assert remaining(readers, units, kept).tolist() == by_brute_force(problems, units, kept)


def test_costs_are_how_much_the_error_grows() -> None:
    kernel, covariance = problem(3, 4, 12)
    reader = Reader(kernel, covariance, torch.arange(12).view(4, 3), torch.arange(0))
    before = 0.0
    for unit in (2, 0, 3):
        cost = float(reader.costs()[unit])
        reader.remove(unit)
        gone = {2: [2], 0: [2, 0], 3: [2, 0, 3]}[unit]
        now = error(kernel, covariance, torch.tensor([c for c in range(12) if c // 3 not in gone]))
        assert cost == pytest.approx(now - before, rel=1e-9)
        before = now


def test_repaired_weights_are_those_of_least_squares() -> None:
    kernel, covariance = problem(4, 3, 9)
    columns = torch.tensor([0, 2, 5, 8])
    best = repaired(kernel, covariance, columns)
    assert float(best[:, others(9, columns)].abs().max()) == 0.0
    lost = kernel - best
    assert float(((lost @ covariance) * lost).sum()) == pytest.approx(error(kernel, covariance, columns), rel=1e-9)
    torch.testing.assert_close(repaired(kernel, covariance, torch.arange(9)), kernel)


def test_of_units_that_cost_the_same_the_first_goes() -> None:
    kernel = torch.zeros(2, 6, dtype=torch.float64)
    reader = Reader(
        kernel, regularized(torch.zeros(6, 6, dtype=torch.float64)), torch.arange(6).view(3, 2), torch.arange(0)
    )
    assert remaining([reader], 3, 1).tolist() == [2]
