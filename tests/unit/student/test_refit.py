"""Layers fitted to what they get: against blocks for which the right weights are known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.cut import Granularity, cut
from distill.recipes import Separable, replace_convolutions
from distill.student.refit import before_activation, refit_block, refit_in_a_row
from distill.training.losses import relative_error

NOISE = torch.randn(32, 2, 10, 10, generator=torch.Generator().manual_seed(0))
# Neighbouring pixels and channels have much in common, as in images.
IMAGES = nn.functional.avg_pool2d(torch.cat([NOISE, NOISE.roll(1, 1) + 0.3 * NOISE.flip(3)], 1), 3, stride=1) * 3


class Block(nn.Module):
    """Two convolutions beside a shortcut; the second's output goes through `gate` before the sum."""

    def __init__(self, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.gate = gate or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(self.gate(y) + x)


@pytest.fixture
def teacher() -> nn.Module:
    return settled(Block())


@torch.no_grad()
def settled(module: nn.Module) -> nn.Module:
    """Give batch norms the statistics of what they get, and weights that differ."""
    generator = torch.Generator().manual_seed(1)
    for norm in (one for one in module.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
        norm.bias.copy_(torch.rand(norm.bias.shape, generator=generator) - 0.5)
        norm.momentum = None
    module.train()(IMAGES)
    return module.eval()


def replaced(teacher: nn.Module, *paths: str, rank: int = 1) -> nn.Module:
    student = copy.deepcopy(teacher)
    recipe = Separable(rank=rank, init="teacher")
    replace_convolutions(student, paths, recipe, torch.Generator().manual_seed(0))
    return student.eval()


def off(student: nn.Module, teacher: nn.Module, x: Tensor = IMAGES) -> float:
    with torch.no_grad():
        return float(relative_error(student(x), teacher(x)))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.Hardswish(), nn.SiLU()])
def test_what_the_last_activation_gets_is_seen(activation: nn.Module) -> None:
    linear = nn.Linear(5, 5)
    x = torch.randn(7, 5)
    assert torch.equal(
        before_activation(nn.Sequential(linear, nn.ReLU(), linear, activation), x), linear(linear(x).relu())
    )


def test_without_an_activation_at_its_end_it_is_the_output() -> None:
    block = nn.Sequential(nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(7, 5)
    assert torch.equal(before_activation(block, x), block(x))


def test_a_layer_that_can_give_what_the_teacher_gives_comes_to_that(teacher: nn.Module) -> None:
    """With all nine filters a separable layer can be any convolution."""
    student = replaced(teacher, "conv2", rank=9)
    with torch.no_grad():
        part = student.get_submodule("conv2.pointwise")
        part.weight.add_(0.3 * torch.randn(part.weight.shape, generator=torch.Generator().manual_seed(2)))
    before = off(student, teacher)
    for _ in range(4):  # each time drawn a little towards what it was
        assert refit_block(student, teacher, [(IMAGES, IMAGES)], ["conv2"]) == 1
    assert off(student, teacher) < 1e-2 * before


def test_every_replaced_layer_is_fitted_and_the_block_gets_better(teacher: nn.Module) -> None:
    student = replaced(teacher, "conv1", "conv2")
    before = off(student, teacher)
    others = {name: value for name, value in student.state_dict().items() if "depthwise" in name}
    assert (
        refit_block(student, teacher, [(IMAGES[:16], IMAGES[:16]), (IMAGES[16:], IMAGES[16:])], ["conv1", "conv2"]) == 2
    )
    assert off(student, teacher) < 0.8 * before
    assert all(torch.equal(student.state_dict()[name], value) for name, value in others.items())


def test_it_makes_good_what_blocks_before_have_lost(teacher: nn.Module) -> None:
    """The block gets inputs that are off: fitted to those it is closer to what the teacher gives for the right ones."""
    student = replaced(teacher, "conv1", "conv2", rank=3)
    own = 0.7 * IMAGES + 0.3
    with torch.no_grad():
        before = relative_error(student(own), teacher(IMAGES))
        refit_block(student, teacher, [(IMAGES, own)], ["conv1", "conv2"])
        assert relative_error(student(own), teacher(IMAGES)) < 0.8 * before


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Tanh()], ids=["sigmoid", "tanh"])
def test_a_layer_whose_output_does_not_enter_as_a_sum_is_fitted_to_the_teacher_s_alone(gate: nn.Module) -> None:
    teacher = settled(Block(gate))
    student = replaced(teacher, "conv2", rank=3)
    norm2 = copy.deepcopy(student.get_submodule("norm2"))
    assert refit_block(student, teacher, [(IMAGES, IMAGES)], ["conv2"]) == 1
    heard: list[Tensor] = []
    for block in (student, teacher):
        block.get_submodule("norm2").register_forward_hook(lambda _, __, y: heard.append(y))
        block(IMAGES)
    assert float(relative_error(*heard).detach()) < 0.5
    assert not torch.equal(student.get_submodule("norm2").running_mean, norm2.running_mean)  # type: ignore[arg-type]


def test_a_student_without_a_layer_to_fit_is_left_as_it_is(teacher: nn.Module) -> None:
    student = copy.deepcopy(teacher)
    assert refit_block(student, teacher, [(IMAGES, IMAGES)], []) == 0
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True)
    )


def test_blocks_are_fitted_behind_one_another() -> None:
    torch.manual_seed(0)
    network = settled(nn.Sequential(Block(), Block(), Block()))
    chain = cut(network, IMAGES[:2], granularity=Granularity.modules, modules=["0", "1", "2"])
    paths = {index: [f"{index}.conv1", f"{index}.conv2"] for index in range(len(chain.blocks))}
    students: dict[int, nn.Module] = {}
    for index, names in paths.items():
        block = chain.block_module(index)
        replace_convolutions(block, names, Separable(rank=1, init="teacher"), torch.Generator().manual_seed(0))
        students[index] = block.eval()
    with torch.no_grad():
        before = relative_error(chain.run_with(students, IMAGES), network(IMAGES))
    assert refit_in_a_row(chain, students, paths, [IMAGES[:16], IMAGES[16:]], {}) == 6
    assert relative_error(chain.run_with(students, IMAGES), network(IMAGES)) < 0.7 * before
