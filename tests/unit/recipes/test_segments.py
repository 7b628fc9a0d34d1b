"""Light multi-segment activation: ReLU as it is made, what it learns from, what it remembers, where it is put."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.cut import Granularity, cut
from distill.recipes import Separable
from distill.recipes.activations import calls_relu, install, made_student, relus, with_activation
from distill.recipes.segments import SEGMENTS, LightSegments
from distill.student.refit import before_activation

EDGES = torch.tensor([0.0, -0.0, -1e-30, 1e-30, -1e-6, 3.0, -3.0, 1e30, -1e30, float("inf")])


def learnt(mean: float = 0.0) -> LightSegments:
    torch.manual_seed(0)
    activation = LightSegments()
    activation(2 * torch.randn(64, 8) + mean)
    with torch.no_grad():
        activation.slopes.normal_(std=0.3)
        activation.biases.normal_(std=0.3)
    return activation.eval()


def by_hand(activation: LightSegments, x: Tensor) -> Tensor:
    """Equation 4, value by value."""
    width = float(activation.deviation) * 6 / SEGMENTS
    borders = [(number - int(activation.zero)) * width for number in range(1, SEGMENTS)]
    found = []
    for value in x.flatten().tolist():
        segment = sum(value >= border for border in borders)
        slope = activation.slopes[segment] + (segment >= activation.zero)
        found.append(slope * value + activation.biases[segment])
    return torch.stack(found).view(x.shape)


@pytest.mark.parametrize("mean", [0.0, 3.0, -3.0, 100.0])
def test_as_it_is_made_it_is_relu_whatever_it_gets(mean: float) -> None:
    activation = LightSegments()
    assert torch.equal(activation.eval()(EDGES), EDGES.relu())
    activation.train()
    for step in range(3):
        x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(step)) * (1 + step) + mean
        assert torch.equal(activation(x), x.relu())
    assert torch.equal(activation(EDGES[:9].double().float()), EDGES[:9].relu())


def test_a_learnt_one_is_a_slope_and_a_bias_in_each_segment() -> None:
    activation = learnt(1.0)
    x = torch.linspace(-9, 9, 97)
    torch.testing.assert_close(activation(x), by_hand(activation, x))
    last = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
    assert activation(last).stride() == last.stride()
    torch.testing.assert_close(activation(last), by_hand(activation, last))
    apart = torch.randn(6, 8)[:, ::2]
    torch.testing.assert_close(activation(apart), by_hand(activation, apart))


def test_gradients_are_those_of_the_formula() -> None:
    activation = learnt()
    x = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(3, 4, 5, 5)
    wanted = torch.autograd.grad((by_hand(activation, x.detach()) * weight).sum(), activation.parameters())
    (activation(x) * weight).sum().backward()
    for parameter, gradient in zip(activation.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)
    assert x.grad is not None
    step = 1e-3
    rise = (activation(x.detach() + step) - activation(x.detach())) / step
    inside = (rise.abs() < 10).logical_and((activation(x.detach() - step) - activation(x.detach())).abs() < 0.01)
    torch.testing.assert_close(x.grad[inside], (rise * weight)[inside], atol=2e-2, rtol=1e-2)


def test_of_large_images_the_parameters_gradients_are_estimated_and_always_the_same() -> None:
    activation = learnt()
    x = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(2):
        activation.zero_grad()
        activation(x).sum().backward()
        found.append([parameter.grad for parameter in activation.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert float(found[0][1].sum()) == x.numel()


def test_statistics_move_in_training_alone_and_are_in_the_state() -> None:
    activation = LightSegments()
    activation(5 * torch.randn(64, 64) - 4)
    state = copy.deepcopy(activation.state_dict())
    assert set(state) == {"slopes", "biases", "deviation", "zero", "batches"}
    assert float(state["deviation"]) == pytest.approx(5, rel=0.05)
    assert float(state["zero"]) == 5  # the mean, and the middle of the segments, lies below zero
    activation.eval()(torch.randn(8, 8))
    assert all(torch.equal(state[name], tensor) for name, tensor in activation.state_dict().items())
    activation.train()(10 * torch.randn(64, 64))
    assert float(activation.deviation) == pytest.approx(0.9 * 5 + 0.1 * 10, rel=0.05)
    assert float(activation.zero) == 5


def test_what_is_not_a_number_stays_so() -> None:
    assert learnt()(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]


def test_an_exported_program_gives_the_same() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), learnt(), nn.Flatten()).eval().requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    batch = torch.export.Dim("batch", min=1)
    stream = io.BytesIO()
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=({0: batch},)), stream)
    program = torch.export.load(io.BytesIO(stream.getvalue())).module()
    more = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(program(more), network(more))


class Small(nn.Module):
    """Two blocks with a ReLU each, a third ReLU in both, and one that is called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.common = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.common(self.second(self.common(self.first(x)))).relu().mean((2, 3))


def test_relus_of_one_block_alone_are_replaced_in_the_block_and_in_the_network() -> None:
    torch.manual_seed(0)
    network, x = Small().eval(), torch.randn(2, 3, 8, 8)
    chain = cut(network, x, granularity=Granularity.conv)
    blocks = [chain.block_module(index) for index in range(len(chain.blocks))]
    paths = [relus(block) for block in blocks]
    assert paths[:2] == [["first.2", "common"], ["second.2", "common"]]
    assert [calls_relu(block) for block in blocks][:2] == [False, True]
    recipe = Separable(rank=1)
    changes = with_activation({"convolutions": ["second.0"]}, "lma", blocks[1], {"common"})
    assert changes["activations"] == {"lma": ["second.2"]}
    student = made_student(recipe, blocks[1], changes, torch.Generator().manual_seed(0))
    plain = recipe.student(chain.block_module(1), changes, torch.Generator().manual_seed(0))
    inputs = torch.randn(2, 16, 8, 8)
    assert torch.equal(student.train()(inputs), plain.train()(inputs))
    install(recipe, network, changes)
    assert isinstance(network.second[2], LightSegments)
    assert not network.second[2].training
    assert set(student.state_dict()) <= set(network.state_dict())
    assert type(network.common) is nn.ReLU


def test_a_block_that_ends_in_one_is_fitted_before_it() -> None:
    activation, x = learnt(), torch.randn(4, 4)
    assert torch.equal(before_activation(nn.Sequential(nn.Identity(), activation), x), x)
