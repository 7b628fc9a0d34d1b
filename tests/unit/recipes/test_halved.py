"""Blocks of half the width: which layers, how wide, and how near they start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.profiling.statistics import gather
from distill.recipes import Halved, View
from distill.training.losses import relative_error

IMAGES = torch.rand(32, 16, 10, 10, generator=torch.Generator().manual_seed(0))
IMAGES = IMAGES + 2 * IMAGES.roll(1, 1)  # channels have much in common


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(x))) + x


def view_of(block: nn.Module) -> View:
    return View(
        name="block",
        module=block.eval(),
        sample=IMAGES[:2],
        convolutions=("conv1", "conv2"),
        changeable=frozenset({"conv1", "conv2"}),
        path="block",
    )


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def test_every_convolution_has_half_the_filters_and_a_pointwise_one_restores_the_width(block: nn.Module) -> None:
    changes, kept = Halved().propose(view_of(block))
    assert changes is not None
    assert not kept
    student = Halved().student(block, changes)
    shapes = [tuple(layer.weight.shape) for layer in student.modules() if isinstance(layer, nn.Conv2d)]
    assert shapes == [(16, 16, 3, 3), (8, 16, 3, 3), (16, 8, 1, 1)]
    assert Halved().paths(changes) == ["conv1", "conv2"]


def test_the_full_ratio_keeps_the_block(block: nn.Module) -> None:
    assert Halved(ratio=1.0).propose(view_of(block))[0] is None


def test_it_starts_nearer_when_it_knows_what_flows_into_the_block(block: nn.Module) -> None:
    changes, _ = Halved().propose(view_of(block))
    assert changes is not None
    with torch.no_grad():
        wanted = block(IMAGES) - IMAGES
    layers = {path: block.get_submodule(path) for path in Halved().wants(changes)}
    statistics = gather(layers, [IMAGES], block)
    errors = {}
    for init in ("data", "teacher", "random"):
        torch.manual_seed(0)
        student = Halved(init=init).student(Block(), changes, torch.Generator().manual_seed(0), statistics).eval()
        with torch.no_grad():
            errors[init] = float(relative_error(student(IMAGES) - IMAGES, wanted))
    assert errors["data"] < 0.5 * errors["teacher"]
    assert errors["teacher"] < errors["random"]


def test_a_ratio_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student\.options\.ratio"):
        Halved(ratio=0.0)
