"""Separable convolutions in two forms: the same function, and the faster one is exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.deployment.forms import BRANCHES, REPEATED, faster_form, forms_of, with_branches
from distill.deployment.measure import Call
from distill.deployment.runtimes import Runtime, Source
from distill.deployment.stopwatch import Stopwatch
from distill.deployment.tables import KeptHere
from distill.recipes.separable import Branches, SeparableConv2d


def network(rank: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)  # type: ignore[arg-type]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), SeparableConv2d(nn.Conv2d(8, 6, 3, **options), rank), norm, nn.Flatten()
    ).eval()


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "padding": 1}, {"stride": 2, "padding": "valid"}, {"padding": 1, "padding_mode": "reflect"}],
    ids=str,
)
@torch.no_grad()
def test_a_sum_of_branches_is_the_same_function(rank: int, options: dict[str, Any]) -> None:
    one, images = network(rank, **options), torch.randn(3, 3, 12, 12)
    other = with_branches(one)
    assert other is not None
    assert isinstance(other[1], Branches)
    assert len(other[1].branches) == rank
    assert not any(isinstance(layer, SeparableConv2d) for layer in other.modules())
    assert isinstance(other[2], nn.Identity), "the batch norm is in the branches"
    assert isinstance(one[1], SeparableConv2d), "the network itself stays as it is"
    assert isinstance(one[2], nn.BatchNorm2d)
    torch.testing.assert_close(other(images), one(images), rtol=1e-4, atol=1e-5)


class Untraceable(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if float(x.sum()) < torch.inf else x


class ReadTwice(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        separated = self[1](self[0](x))
        return (self[2](separated) + separated).flatten(1)


class ReadByNobody(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self[0](x)
        self.seen = self[1](first)  # and what is kept of a trace must not be exported
        return first.flatten(1)


@pytest.mark.parametrize("kind", [Untraceable, ReadTwice, ReadByNobody])
@torch.no_grad()
def test_a_batch_norm_that_may_not_be_alone_behind_stays(kind: type[nn.Sequential]) -> None:
    one, images = kind(*network()), torch.randn(3, 3, 12, 12)
    other = with_branches(one.eval())
    assert other is not None
    assert isinstance(other[2], nn.BatchNorm2d)
    assert not isinstance(getattr(other, "seen", None), torch.fx.Proxy)
    torch.testing.assert_close(other(images), one(images), rtol=1e-4, atol=1e-5)


def test_a_network_with_one_form_has_no_other() -> None:
    assert with_branches(network(rank=1)) is None
    assert len(forms_of(network(rank=1))) == 1
    assert len(forms_of(network(rank=2))) == 2


@dataclass(frozen=True, kw_only=True)
class Prefers(Runtime):
    """A runtime that is faster at one of the forms."""

    name, precisions = "prefers", ("fp32",)
    form: str

    def source(self, module: nn.Module, sample: torch.Tensor) -> Source:
        form = BRANCHES if any(isinstance(one, Branches) for one in module.modules()) else REPEATED
        return Source(form, 0.01 if form == self.form else 0.02)

    def start(self, source: Source, sample: torch.Tensor) -> Call:
        assert sample.shape == (4, 3, 12, 12)
        return lambda times: times * float(source.program)


@pytest.mark.parametrize("form", [BRANCHES, REPEATED])
def test_the_faster_form_is_chosen_and_both_times_are_told(tmp_path: Path, form: str) -> None:
    one, watch = network(), Stopwatch(runtime=Prefers(form=form), timings=KeptHere({}, tmp_path))
    chosen, record = faster_form(one, watch, image_shape=(3, 12, 12), batch=4)
    assert (chosen is one) == (form == REPEATED)
    slower = BRANCHES if form == REPEATED else REPEATED
    assert record.pop("ms") == pytest.approx({form: 10.0, slower: 20.0})
    assert record == {"form": form, "batch": 4, "runtime": "prefers"}
    assert faster_form(network(rank=1), watch, image_shape=(3, 12, 12), batch=4)[1] == {}
