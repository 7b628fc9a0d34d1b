"""Recipes: what replaces a convolution, what its first weights are, and how replacements get into a network."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from distill.recipes import RECIPES, Cost, Separable, SeparableX2, replace_convolutions, select
from distill.recipes.separable import SeparableConv2d, decouple

SEED = 7


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def images(channels: int = 3, size: int = 11) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=generator())


def conv(**options: Any) -> nn.Conv2d:
    torch.manual_seed(SEED)
    return nn.Conv2d(3, 8, **{"kernel_size": 3, **options})


def separated(dense: nn.Conv2d, rank: int, init: str = "teacher") -> SeparableConv2d:
    recipe = Separable(rank=rank, init=init)
    replacement = recipe.build(dense)
    recipe.initialize(replacement, dense, generator())
    return replacement


FORMS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": 2, "padding": 2},
    {"bias": False, "padding": 1},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular"},
    {"kernel_size": 5, "padding": 2, "stride": 2},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": (4, 2)},
]


class TestSeparable:
    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_full_rank_is_the_dense_convolution(self, form: dict[str, Any]) -> None:
        dense = conv(**form)
        replacement = separated(dense, rank=25)  # more than any kernel has; build() takes what there is
        torch.testing.assert_close(replacement(images()), dense(images()), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_rank_one_keeps_the_shape_of_the_output(self, form: dict[str, Any]) -> None:
        dense = conv(**form)
        assert separated(dense, rank=1)(images()).shape == dense(images()).shape

    def test_rank_is_capped_at_the_taps_of_the_kernel(self) -> None:
        assert Separable(rank=100, init="teacher").build(conv()).rank == 9
        assert Separable(rank=100, init="teacher").build(conv(kernel_size=(1, 3))).rank == 3

    def test_weights_are_those_of_the_docstring(self) -> None:
        # rank (k^2 C + C D) with rank 2, k 3, C 3, D 8, and a bias of 8
        count = sum(p.numel() for p in separated(conv(), rank=2).parameters())
        assert count == 2 * (9 * 3 + 3 * 8) + 8

    def test_bias_is_the_teacher_s(self) -> None:
        dense = conv()
        assert torch.equal(separated(dense, rank=1).pointwise.bias, dense.bias)
        assert separated(conv(bias=False), rank=1).pointwise.bias is None

    def test_fewer_outputs_than_filters_is_still_exact(self) -> None:
        torch.manual_seed(SEED)
        dense = nn.Conv2d(3, 2, 3, padding=1)
        torch.testing.assert_close(separated(dense, rank=9)(images()), dense(images()), rtol=1e-4, atol=1e-5)

    def test_low_precision_weights_are_decoupled_too(self) -> None:
        dense = conv().to(torch.bfloat16)
        depthwise, pointwise = decouple(dense.weight, 2)
        assert depthwise.dtype == pointwise.dtype == torch.bfloat16


def composed(depthwise: torch.Tensor, pointwise: torch.Tensor, channels: int, rank: int) -> torch.Tensor:
    """The dense kernel (D, C, k, k) that a depthwise-then-pointwise pair amounts to."""
    filters = depthwise.view(rank, channels, *depthwise.shape[2:])
    weights = pointwise.view(-1, rank, channels)
    return torch.einsum("rckl,drc->dckl", filters, weights)


class TestDecouple:
    KERNEL = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @pytest.mark.parametrize("rank", [1, 2, 5, 8])
    def test_error_is_that_of_the_discarded_singular_values(self, rank: int) -> None:
        # Eckart and Young 1936: per input channel, the squared error is the sum of the squares of those left out.
        error = (composed(*decouple(self.KERNEL, rank), 3, rank) - self.KERNEL).square().sum()
        discarded = sum(torch.linalg.svdvals(self.KERNEL[:, c].reshape(8, 9))[rank:].square().sum() for c in range(3))
        torch.testing.assert_close(error, torch.as_tensor(discarded), rtol=1e-9, atol=1e-20, check_dtype=False)

    def test_error_falls_with_the_rank(self) -> None:
        errors = [float((composed(*decouple(self.KERNEL, r), 3, r) - self.KERNEL).norm()) for r in range(1, 10)]
        assert all(more < less for less, more in pairwise(errors[:8]))
        assert errors[7] < 1e-12  # eight outputs: rank eight is exact

    def test_the_same_kernel_gives_the_same_bits(self) -> None:
        one, two = decouple(self.KERNEL.float(), 2), decouple(self.KERNEL.float().clone(), 2)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    def test_memory_format_of_the_kernel_does_not_matter(self) -> None:
        plain = decouple(self.KERNEL.float(), 2)
        last = decouple(self.KERNEL.float().to(memory_format=torch.channels_last), 2)
        assert all(torch.equal(a, b) for a, b in zip(plain, last, strict=True))


class TestSeparableX2:
    RECIPE = SeparableX2(rank=2, init="random")

    @pytest.mark.parametrize("form", [form for form in FORMS if form.get("kernel_size") != (4, 2)], ids=str)
    def test_keeps_the_shape_of_the_output(self, form: dict[str, Any]) -> None:
        dense = conv(**form)
        replacement = self.RECIPE.build(dense)
        assert self.RECIPE.fits(dense)
        assert replacement(images()).shape == dense(images()).shape

    def test_stride_halves_the_image_once(self) -> None:
        assert self.RECIPE.build(conv(stride=2, padding=1))(images(size=8)).shape == (2, 8, 4, 4)

    def test_outputs_are_not_negative(self) -> None:
        dense = conv(padding=1)
        replacement = self.RECIPE.build(dense)
        self.RECIPE.initialize(replacement, dense, generator())
        out = replacement(images())
        assert out.min() >= 0
        assert out.max() > 0

    def test_even_kernels_are_left_alone(self) -> None:
        assert not self.RECIPE.fits(conv(kernel_size=2))
        assert not self.RECIPE.fits(conv(kernel_size=(3, 2)))
        assert Separable(rank=1, init="teacher").fits(conv(kernel_size=2))


@pytest.mark.parametrize("recipe", [Separable(rank=2, init="random"), SeparableX2(rank=2, init="random")])
class TestEveryRecipe:
    def test_pointwise_and_grouped_convolutions_are_left_alone(self, recipe: Any) -> None:
        assert recipe.fits(nn.Conv2d(4, 4, 3))
        assert not recipe.fits(nn.Conv2d(4, 4, 1))
        assert not recipe.fits(nn.Conv2d(4, 4, 3, groups=2))
        assert not recipe.fits(nn.Conv2d(4, 4, 3, groups=4))

    def test_other_layers_are_left_alone(self, recipe: Any) -> None:
        assert not any(recipe.fits(module) for module in (nn.Linear(2, 2), nn.BatchNorm2d(2), nn.Conv1d(2, 2, 3)))

    def test_random_weights_come_from_the_generator_alone(self, recipe: Any) -> None:
        dense = conv(padding=1)
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(states))  # the global generator must not matter
            replacement = recipe.build(dense)
            recipe.initialize(replacement, dense, torch.Generator().manual_seed(seed))
            states.append(replacement.state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])

    def test_options_rebuild_the_recipe(self, recipe: Any) -> None:
        name = next(name for name, kind in RECIPES.items() if kind is type(recipe))
        assert RECIPES[name](**recipe.options()).options() == recipe.options() == {"rank": 2, "init": "random"}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.first(x))


class TestReplaceConvolutions:
    def test_replaces_the_named_ones_and_no_others(self) -> None:
        network = Network()
        replace_convolutions(network, ["body.1"], Separable(rank=1, init="teacher"), generator())
        assert isinstance(network.first, nn.Conv2d)
        assert isinstance(network.body[1], SeparableConv2d)
        assert network(images(size=8)).shape == (2, 5, 4, 4)

    @pytest.mark.parametrize("training", [True, False])
    def test_replacements_keep_mode_and_element_type(self, training: bool) -> None:
        network = Network().double().train(training)
        replace_convolutions(network, ["first"], Separable(rank=1, init="random"), generator())
        assert all(module.training == training for module in network.first.modules())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}

    def test_rebuilt_without_a_generator_a_state_dict_fills_it(self) -> None:
        paths, recipe = ["first", "body.1"], Separable(rank=2, init="teacher")
        one, two = Network().eval(), Network().eval()
        replace_convolutions(one, paths, recipe, generator())
        replace_convolutions(two, paths, recipe)
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(images()), two(images()))

    def test_the_order_of_paths_decides_the_random_numbers(self) -> None:
        def weights(paths: list[str]) -> torch.Tensor:
            network = Network()
            replace_convolutions(network, paths, Separable(rank=1, init="random"), generator())
            return network.first.depthwise.weight.detach()

        assert torch.equal(weights(["first", "body.1"]), weights(["first"]))
        assert not torch.equal(weights(["body.1", "first"]), weights(["first"]))


class _Late(Separable):
    """Strides in the pointwise layer: fewer parameters than the dense convolution, and more FLOPs."""

    def build(self, conv: nn.Conv2d) -> Any:
        replacement = super().build(conv)
        replacement.depthwise.stride, replacement.pointwise.stride = (1, 1), conv.stride
        return replacement

    def predict(self, conv: nn.Conv2d, pixels: int) -> Cost:
        usual = super().predict(conv, pixels)
        return replace(usual, flops=usual.flops * conv.stride[0] * conv.stride[1])


class _Wrong(Separable):
    """Forgets the padding."""

    def build(self, conv: nn.Conv2d) -> Any:
        replacement = super().build(conv)
        replacement.depthwise.padding = (0, 0)
        return replacement

    def at_full_size(self, conv: nn.Conv2d) -> nn.Module:
        return self.build(conv)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Separable(rank=1, init="random"), None),
        (Separable(rank=7, init="random"), r"its replacement would have 357 parameters for 216"),
        (_Late(rank=2, init="random"), r"its replacement would take [\d,]+ FLOPs an image for"),
        (_Wrong(rank=1, init="random"), "the recipe at full size is 1.* off"),
    ],
)
def test_a_convolution_is_kept_that_a_replacement_would_not_better(recipe: Separable, words: str | None) -> None:
    block = nn.Sequential(conv(stride=4, padding=1, bias=False), nn.ReLU())
    taken, kept = select(block, images(), ["0"], recipe)
    assert (taken, list(kept)) == (((), ["0"]) if words else (("0",), []))
    assert words is None or re.search(words, kept["0"])
