"""Optimal brain surgeon by a sketch, against that by the covariance which the sketch amounts to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.profiling.sketch import Sketch
from distill.recipes.surgeon import Reader, regularized, remaining, repaired
from distill.recipes.wide_surgeon import WideReader

WIDTH, OUTPUTS, UNITS, SIZE = 30, 7, 12, 2


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.fixture(params=[5, 40], ids=["few directions", "more than inputs"])
def sketch(request: pytest.FixtureRequest) -> Sketch:
    found = regularized(Sketch(drawn(WIDTH, request.param), drawn(WIDTH).square()))
    assert isinstance(found, Sketch)
    return found


@pytest.fixture
def covariance(sketch: Sketch) -> Tensor:
    return torch.eye(WIDTH, dtype=torch.float64) @ sketch


KERNEL = drawn(OUTPUTS, WIDTH)
COLUMNS = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
READS, REST = COLUMNS[: UNITS * SIZE].reshape(UNITS, SIZE), COLUMNS[UNITS * SIZE :]


def test_it_repairs_as_the_whole_covariance_does(sketch: Sketch, covariance: Tensor) -> None:
    for columns in (REST, torch.arange(WIDTH), torch.arange(0, WIDTH, 2)):
        torch.testing.assert_close(repaired(KERNEL, sketch, columns), repaired(KERNEL, covariance, columns))


def test_units_cost_the_same(sketch: Sketch, covariance: Tensor) -> None:
    readers = [kind(KERNEL, known, READS, REST) for kind, known in ((WideReader, sketch), (Reader, covariance))]
    torch.testing.assert_close(readers[0].costs(), readers[1].costs())
    for unit in (3, 8):  # of twelve, more than an eighth: the costs of the others are new
        for reader in readers:
            reader.remove(unit)
    alive = [unit for unit in range(UNITS) if unit not in (3, 8)]
    torch.testing.assert_close(readers[0].costs()[alive], readers[1].costs()[alive])


def test_some_units_at_a_time_cost_the_same(sketch: Sketch, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = WideReader(KERNEL, sketch, READS, REST).costs()
    monkeypatch.setattr("distill.recipes.wide_surgeon.AT_A_TIME", 5 * SIZE * OUTPUTS)
    torch.testing.assert_close(WideReader(KERNEL, sketch, READS, REST).costs(), wanted)


def test_what_remains_loses_hardly_more_than_where_every_step_is_exact(sketch: Sketch, covariance: Tensor) -> None:
    losses = []
    for kind, known in ((WideReader, sketch), (Reader, covariance)):
        kept = remaining([kind(KERNEL, known, READS, REST)], UNITS, 4)
        assert len(kept) == 4
        off = KERNEL - repaired(KERNEL, covariance, torch.cat([READS[kept].flatten(), REST]))
        losses.append(float((off @ covariance * off).sum()))
    assert losses[0] < 1.05 * losses[1]
