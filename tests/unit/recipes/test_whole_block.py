"""What takes a whole block's place: its form, what is kept and why, and how it starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.recipes import Bottleneck, Changes, Inverted, OneConv, Skip, View, WholeBlock
from distill.student.assemble import recalibrate
from distill.student.refit import refit_block
from distill.training.losses import relative_error

IMAGES = torch.rand(16, 8, 12, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a projection where shapes differ."""

    def __init__(self, outputs: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, outputs, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.past = nn.Identity() if stride == 1 else nn.Conv2d(8, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.past(x))


class Network(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.at = block

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.at(x)
        return result


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def view_of(block: nn.Module, path: str | None = "at") -> View:
    module = Network(block)
    layers = frozenset(name for name, part in module.named_modules() if any(True for _ in part.parameters(False)))
    return View(name="at", module=module, sample=IMAGES, convolutions=(), changeable=layers, path=path)


def student_of(recipe: WholeBlock, view: View) -> tuple[nn.Module, Changes]:
    changes, kept = recipe.propose(view)
    assert changes is not None, kept
    return recipe.student(view.module, changes, torch.Generator().manual_seed(0)), changes


class TestSkip:
    def test_is_the_identity_where_shapes_allow(self) -> None:
        student, _ = student_of(Skip(), view_of(Block()))
        assert not list(student.parameters())
        assert torch.equal(student(IMAGES), IMAGES)

    def test_passes_the_mean_of_pixels_on_with_the_teacher_s_init_where_sizes_differ(self) -> None:
        student, _ = student_of(Skip(init="teacher"), view_of(Block(outputs=16, stride=2)))
        out = student.eval()(IMAGES)
        assert torch.allclose(out[:, :8], nn.functional.avg_pool2d(IMAGES, 2), atol=1e-4)
        assert not out[:, 8:].any()

    def test_keeps_what_it_makes_no_cheaper(self) -> None:
        pointwise = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        assert Skip().propose(view_of(pointwise)) == (None, {"at": "its replacement would be no cheaper"})


@pytest.mark.parametrize(
    "recipe", [OneConv(), Bottleneck(), Inverted(), Skip()], ids=lambda recipe: type(recipe).__name__
)
class TestEvery:
    def test_keeps_a_block_that_is_no_module_or_gives_no_images(self, recipe: WholeBlock) -> None:
        assert recipe.propose(view_of(Block(), path=None))[1] == {"at": "the block is not one module of the network"}
        flat = nn.Sequential(nn.Flatten(), nn.Linear(8 * 144, 10))
        assert recipe.propose(view_of(flat))[1] == {"at": "the block is not from images to images"}

    def test_starts_nearer_when_it_is_fitted(self, recipe: WholeBlock) -> None:
        block = Block(outputs=16, stride=2)
        teacher = Network(block).eval()
        student, changes = student_of(recipe, view_of(block))
        recalibrate(student, [IMAGES])
        with torch.no_grad():
            before = relative_error(student(IMAGES), teacher(IMAGES))
            refit_block(student, teacher, [(IMAGES, IMAGES)], recipe.paths(changes))
            assert relative_error(student(IMAGES), teacher(IMAGES)) < 0.6 * before

    def test_is_fitted_with_init_data_alone(self, recipe: WholeBlock) -> None:
        assert recipe.regressed
        assert not type(recipe)(init="random").regressed
        with pytest.raises(ConfigError, match=r"student\.options\.init"):
            type(recipe)(init="date")


def test_a_projection_and_the_layer_beside_it_are_both_fitted() -> None:
    block = Block(outputs=16, stride=2)
    teacher = Network(block).eval()
    student, changes = student_of(Inverted(), view_of(block))
    recalibrate(student, [IMAGES])
    assert refit_block(student, teacher, [(IMAGES, IMAGES)], Inverted().paths(changes)) == 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OneConv, {"kernel": 2}),
        (Bottleneck, {"ratio": 0.0}),
        (Bottleneck, {"align": 0}),
        (Inverted, {"expand": -1.0}),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(kind: type[WholeBlock], options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"student\.options\.{next(iter(options))}"):
        kind(**options)
