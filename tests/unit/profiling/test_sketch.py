"""Covariances of layers with very many inputs: against those that are kept whole, and in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.profiling.sketch import Sketch, Sketching, rows_with_room
from distill.profiling.statistics import bytes_for, gather

WIDTH = 40


def batches(count: int = 6, directions: int = WIDTH) -> list[Tensor]:
    """Rows whose mean moves, and whose directions hold less and less."""
    drawn = torch.Generator().manual_seed(0)
    mix = torch.randn(directions, WIDTH, generator=drawn) * torch.logspace(0, -2, directions)[:, None]
    return [torch.randn(16, directions, generator=drawn) @ mix + number / 10 for number in range(count)]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as wide is narrow here, and there is room for 32 rows."""
    monkeypatch.setattr("distill.profiling.statistics.WIDEST", WIDTH - 1)
    monkeypatch.setattr("distill.profiling.sketch.MOST_ROWS", 32)


def both(rows: list[Tensor]) -> tuple[Tensor, Sketch]:
    every = torch.cat(rows).double()
    sketch = gather({"layer": (layer := nn.Linear(WIDTH, 2))}, rows, layer)["layer"]
    assert isinstance(sketch.covariance, Sketch)
    assert sketch.rows == len(every)
    torch.testing.assert_close(sketch.mean, every.mean(0))
    return torch.cov(every.T, correction=0), sketch.covariance


def dense(sketch: Sketch) -> Tensor:
    return torch.eye(WIDTH, dtype=torch.float64) @ sketch


@pytest.mark.usefixtures("narrow")
class TestSketch:
    def test_what_has_room_is_exact(self) -> None:
        wanted, sketch = both(batches(1))
        torch.testing.assert_close(dense(sketch), wanted)
        assert sketch.share == pytest.approx(1.0)

    def test_few_directions_are_exact_however_many_rows(self) -> None:
        wanted, sketch = both(batches(20, directions=10))
        torch.testing.assert_close(dense(sketch), wanted, rtol=1e-9, atol=1e-9 * float(wanted.diagonal().max()))

    def test_of_many_the_largest_are_kept_and_every_input_s_variance(self) -> None:
        wanted, sketch = both(batches(20))
        assert len(sketch.factors.T) <= 32
        torch.testing.assert_close(sketch.variances, wanted.diagonal())
        assert 0.95 < sketch.share < 1
        assert (dense(sketch) - wanted).norm() < 2e-2 * wanted.norm()

    def test_it_stands_for_the_matrix_on_either_side(self) -> None:
        _, sketch = both(batches(20))
        other = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(other @ sketch, other @ dense(sketch))
        torch.testing.assert_close(sketch @ other.T, dense(sketch) @ other.T)
        some = torch.tensor([7, 3, 30])
        part = sketch.within(some).raised(torch.tensor(0.5))
        wanted = dense(sketch)[some][:, some] + 0.5 * torch.eye(3)
        torch.testing.assert_close(torch.eye(3, dtype=torch.float64) @ part, wanted)

    def test_the_same_rows_give_the_same_bits(self) -> None:
        (_, one), (_, other) = both(batches(20)), both(batches(20))
        assert torch.equal(one.factors, other.factors)
        assert torch.equal(one.rest, other.rest)


def test_nothing_was_seen_where_there_are_no_rows() -> None:
    sums = Sketching(4)
    sums.add(torch.empty(0, 4))
    assert sums.rows == 0
    assert not (torch.eye(4, dtype=torch.float64) @ sums.covariance).any()


@pytest.mark.parametrize("width", [9_216, 25_088, 200_000, 10**9])
def test_memory_has_a_bound_whatever_the_width(width: int) -> None:
    assert bytes_for(width) <= max(2**30, 32 * width)
    assert rows_with_room(width) % 2 == 0
    assert bytes_for(8_192) == 2**29
