"""Bytes of activations that are alive at once, counted by hand and as the sum of what blocks say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from distill.blocks.cut import Granularity, cut
from distill.profiling.liveness import peak_activations
from distill.teachers import build_architecture

MAP = 4 * 8 * 8  # bytes of a channel of an image


class Residual(nn.Module):
    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(16), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.relu(self.norm(self.first(x))))
        return self.relu(y + x)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_read_later_stays_and_what_works_in_place_counts_once(inplace: bool) -> None:
    # The shortcut, the wide activation and what the second convolution gives.
    found = peak_activations(Residual(inplace=inplace), torch.empty(2, 4, 8, 8))
    assert found == 2 * MAP * (4 + 16 + 4)


def test_views_take_no_place_and_input_and_output_count() -> None:
    assert peak_activations(nn.Identity(), torch.empty(2, 4, 8, 8)) == 2 * MAP * 4
    assert peak_activations(nn.Flatten(), torch.empty(2, 4, 8, 8)) == 2 * MAP * 4
    assert peak_activations(nn.Softmax(dim=1), torch.empty(2, 4, 8, 8)) == 2 * 2 * MAP * 4


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "CIFAR ResNet": lambda: build_architecture(source="cifar", name="cifar_resnet20", num_classes=10),
    "DenseNet": lambda: torchvision.models.DenseNet(16, (2, 2, 2, 2), 32),
    "ShuffleNet": torchvision.models.shufflenet_v2_x0_5,
    "MobileNetV2": lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_needs_what_its_most_demanding_block_does(name: str) -> None:
    network = NETWORKS[name]().eval()
    chain = cut(network, torch.randn(2, 3, 32, 32), granularity=Granularity.residual)
    inputs = (torch.empty(5, *chain.boundaries[block.index].shape[1:]) for block in chain.blocks)
    blocks = [peak_activations(chain.block_module(k), x) for k, x in enumerate(inputs)]
    assert peak_activations(network, torch.empty(5, 3, 32, 32)) == max(blocks)
