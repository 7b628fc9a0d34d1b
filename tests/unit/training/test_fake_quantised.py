"""A block in numbers that INT8 has: what ONNX Runtime computes of its quantised program, and gradients through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.deployment.graphs import to_onnx
from distill.deployment.quantised import quantised
from distill.student.programs import load_onnx
from distill.training.fake_quantised import FakeQuantised, in_levels, rounded_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of exporters


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    layer.running_mean, layer.running_var = torch.randn(channels) / 5, torch.rand(channels) + 0.5
    layer.weight.data.uniform_(0.5, 1.5)
    return layer


class Unit(nn.Module):
    """A residual unit with a depthwise convolution in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 8, 1)
        self.last_norm = norm(8)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm(self.first(x)))
        result: Tensor = torch.relu(x + self.last_norm(self.pointwise(self.depthwise(inner))))
        return result


BLOCKS = {
    "one convolution": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "a residual unit": Unit,
    "cut off at six": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), norm(8), nn.ReLU6(), nn.Conv2d(8, 4, 1)),
    "a head": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
}


@pytest.mark.parametrize("name", list(BLOCKS))
@torch.no_grad()
def test_it_gives_what_onnx_runtime_gives_within_a_level(name: str) -> None:
    torch.manual_seed(0)
    block, images = BLOCKS[name]().eval(), torch.relu(torch.randn(16, 8, 9, 9))
    wanted = load_onnx(quantised(to_onnx(block, images), [images.numpy()]))(images)
    given, exact = FakeQuantised(block, images[:2]).eval()(images), block(images)
    level, off = float(exact.max() - exact.min()) / 255, (given - wanted).abs()
    # Where a sum lies between two levels, rounding may fall either way, and be summed on in the next layer.
    assert float(off.max()) < 3 * level
    assert float((off > level / 2).float().mean()) < 0.05
    assert float((wanted - exact).abs().mean()) > 10 * float(off.mean())


def test_it_trains_the_blocks_own_parameters_through_the_rounding() -> None:
    torch.manual_seed(0)
    block, images = Unit().eval(), torch.relu(torch.randn(4, 8, 9, 9))
    module = FakeQuantised(block, images[:2]).train()
    names = {name.removeprefix("program.") for name in module.state_dict()}
    assert names == set(block.state_dict())
    statistics = module.state_dict()["program.norm.running_mean"].clone()
    module(images).square().sum().backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in module.parameters())
    assert torch.equal(module.state_dict()["program.norm.running_mean"], statistics)


def test_zero_is_a_level_and_weights_have_a_scale_for_each_output() -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 3.0])
    assert in_levels(x, x.min(), x.max())[1] == 0
    assert float((in_levels(x, x.min(), x.max()) - x).abs().max()) <= 4 / 255 / 2 + 1e-6
    weights = rounded_weights(torch.tensor([[127.0, 1.4], [0.127, 0.0014]]))
    torch.testing.assert_close(weights, torch.tensor([[127.0, 1.0], [0.127, 0.001]]))
    assert torch.equal(rounded_weights(torch.zeros(2, 3)), torch.zeros(2, 3))
