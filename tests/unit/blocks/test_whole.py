"""Which blocks are one module of the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.blocks.cut import Granularity, cut
from distill.blocks.whole import whole_modules

IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """A branch in a module of its own, and a shortcut, if any, in the code around it."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.conv = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return x + result if self.shortcut else result


def found(*blocks: nn.Module) -> set[str]:
    torch.manual_seed(0)
    network = nn.Sequential(*blocks).eval()
    chain = cut(network, IMAGES, granularity=Granularity.residual)
    return set(whole_modules(network, chain, IMAGES).values())


def test_the_module_that_adds_the_shortcut_is_the_block_and_not_the_one_around_the_branch() -> None:
    assert found(Branch(shortcut=True), Branch(shortcut=True)) == {"0", "1"}


def test_of_two_modules_that_are_the_block_it_is_the_innermost() -> None:
    assert found(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), Branch(shortcut=True)) == {"0.0", "1"}
