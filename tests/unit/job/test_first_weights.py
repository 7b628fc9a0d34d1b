"""Images on their way through the teacher, and what a short training is compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.blocks.cut import Granularity, cut
from distill.job import assemble
from distill.job.first_weights import OnTheWay
from distill.job.reconcile import TRAINED, UNTRAINED

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def chain() -> Chain:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)]
    return cut(nn.Sequential(*layers), IMAGES, granularity=Granularity.conv)


def test_boundaries_are_those_of_a_whole_pass_and_no_block_runs_twice(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = chain.run(IMAGES, last=3, keep=range(4))
    ran: list[int] = []
    real = chain.run_block

    def counted(index: int, x: Tensor) -> Tensor:
        ran.append(index)
        return real(index, x)

    monkeypatch.setattr(chain, "run_block", counted)
    images = OnTheWay(chain, lambda: IMAGES)
    for asked in ((0, 1), (1, 2), (1,), (2, 3)):
        assert all(torch.equal(x, whole[at]) for x, at in zip(images.at(*asked), asked, strict=True))
    assert ran == [0, 0, 1, 1, 2]  # a block again that was only looked ahead to
    (before,) = images.at(1)
    assert torch.equal(before, whole[1])


@pytest.mark.parametrize(
    ("errors", "names"),
    [
        ({}, [TRAINED]),
        ({1: (0.4, 0.2), 2: (0.4, 0.3)}, [TRAINED]),
        ({1: (0.4, 0.2), 2: (0.4, 0.31)}, [UNTRAINED, TRAINED]),
        ({1: (0.4, float("nan"))}, [UNTRAINED, TRAINED]),
    ],
)
def test_where_training_took_little_away_the_student_without_it_is_judged_too(
    errors: dict[int, tuple[float, float]], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, trained = ({"w": torch.full((1,), value)} for value in (0.0, 1.0))
    monkeypatch.setattr(assemble, "first_weights", lambda _, number: first)
    context: Any = None
    starts = assemble._starts(context, {1: trained, 2: trained}, errors)
    assert list(starts) == names  # the later of equals is taken
    assert starts[TRAINED] == {1: trained, 2: trained}
    assert starts.get(UNTRAINED, {1: first, 2: first}) == {1: first, 2: first}
