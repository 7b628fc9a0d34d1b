"""Low rank: which factors a layer gets, that they are the nearest, and which layers have none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from distill.errors import ConfigError
from distill.profiling.flops import module_flops
from distill.profiling.statistics import gather
from distill.recipes import LowRank, View, replace_layers
from distill.recipes.factors import (
    CHANNEL,
    FORMS,
    SPATIAL,
    TUCKER,
    Factors,
    composed,
    first_factors,
    full_ranks,
    low_rank,
)
from distill.recipes.least_squares import Flow, matrix
from distill.recipes.plain import Layer

SEED = 7


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def conv(inputs: int = 6, outputs: int = 8, **options: Any) -> nn.Conv2d:
    torch.manual_seed(SEED)
    return nn.Conv2d(inputs, outputs, **{"kernel_size": 3, **options})


def linear(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(SEED)
    return nn.Linear(inputs, outputs)


def fed(layer: Layer) -> Tensor:
    """An input of the layer."""
    shape = (2, layer.in_channels, 11, 12) if isinstance(layer, nn.Conv2d) else (2, 5, layer.in_features)
    return torch.randn(shape, generator=generator())


def flow_of(layer: Layer) -> Flow:
    """Correlated inputs, and outputs that count unequally."""
    width, outputs = layer.weight[0].numel(), len(layer.weight)
    mixed = torch.randn(width, width, generator=generator(), dtype=torch.float64)
    covariance = mixed @ torch.diag(torch.logspace(0, -2, width, dtype=torch.float64)) @ mixed.T
    scale = torch.linspace(0.1, 2, outputs, dtype=torch.float64)
    return Flow(torch.randn(width, generator=generator(), dtype=torch.float64), covariance, scale)


def started(layer: Layer, form: str, ranks: tuple[int, ...], flow: Flow | None = None) -> tuple[Factors, nn.Module]:
    way = Factors(form=form, ranks=ranks)
    replacement = way.build(layer)
    way.initialize(replacement, layer, generator(), flow)
    return way, replacement


SQUARE = [
    conv(),
    conv(2, 30, padding=1),
    conv(stride=2, padding=1),
    conv(stride=(2, 1), padding=(0, 2)),
    conv(kernel_size=(5, 3), padding="same", dilation=2),
    conv(padding="valid", bias=False),
    conv(padding=1, padding_mode="reflect"),
    conv(padding=2, padding_mode="circular", kernel_size=(4, 2)),
]
OTHERS = [conv(kernel_size=1), conv(kernel_size=1, stride=2), conv(kernel_size=(1, 3)), linear(5, 12), linear(12, 5)]
CASES = [(layer, form) for layer in SQUARE for form in FORMS] + [(layer, CHANNEL) for layer in OTHERS]


@pytest.mark.parametrize(("layer", "form"), CASES, ids=str)
class TestFactors:
    def test_full_rank_is_the_layer_whatever_is_known_of_its_input(self, layer: Layer, form: str) -> None:
        x, full = fed(layer), full_ranks(layer, form)
        exact = [started(layer, form, full)[1], started(layer, form, full, flow_of(layer))[1]]
        for replacement in [*exact, Factors(form=form, ranks=(1, 1)).at_full_size(layer)]:
            torch.testing.assert_close(replacement(x), layer(x), rtol=1e-4, atol=1e-4)

    def test_fewer_ranks_keep_the_shape_and_cost_what_was_said(self, layer: Layer, form: str) -> None:
        x = fed(layer)
        way, replacement = started(layer, form, (2, 3)[: len(full_ranks(layer, form))])
        assert replacement(x).shape == layer(x).shape
        said = way.cost_for(layer, tuple(x[:1].shape))
        assert said.params == sum(parameter.numel() for parameter in replacement.parameters())
        assert said.flops == module_flops(replacement, x[:1])

    def test_what_flows_in_makes_them_lose_less_there(self, layer: Layer, form: str) -> None:
        flow, ranks = flow_of(layer), (2, 3)[: len(full_ranks(layer, form))]
        errors = []
        for known in (flow, None):
            way, replacement = started(layer, form, ranks, known)
            errors.append(flow.error(matrix(layer.weight) - way.kernel_of(replacement)))
        assert errors[0] < errors[1]

    def test_the_kernel_they_amount_to_is_what_they_compute(self, layer: Layer, form: str) -> None:
        way, replacement = started(layer, form, (2, 3)[: len(full_ranks(layer, form))])
        x, kernel = fed(layer), way.kernel_of(replacement)
        found = replacement(x)
        with torch.no_grad():
            before = layer.weight.clone()
            layer.weight.copy_(kernel.reshape(before.shape))
            wanted = layer(x)
            layer.weight.copy_(before)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    def test_the_same_arguments_give_the_same_bits(self, layer: Layer, form: str) -> None:
        ranks = (2, 3)[: len(full_ranks(layer, form))]
        states = []
        for seed in (1, 2):
            torch.manual_seed(seed)  # the global generator must not matter
            states.append(started(layer, form, ranks, flow_of(layer))[1].state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)], ids=str)
class TestLowRank:
    def test_error_is_that_of_the_discarded_singular_values(self, shape: tuple[int, int]) -> None:
        # Eckart and Young 1936.
        kernel = torch.randn(shape, generator=generator(), dtype=torch.float64)
        left, right = low_rank(kernel, 4)
        discarded = torch.linalg.svdvals(kernel)[4:].square().sum()
        torch.testing.assert_close((kernel - left @ right).square().sum(), discarded, rtol=1e-9, atol=0)

    def test_with_data_it_is_that_of_the_discarded_eigenvalues(self, shape: tuple[int, int]) -> None:
        layer = linear(shape[1], shape[0])
        flow, kernel = flow_of(layer), matrix(layer.weight)
        left, right = low_rank(kernel, 4, flow)
        scaled = flow.scale[:, None] * kernel
        discarded = torch.linalg.eigvalsh(scaled @ flow.covariance @ scaled.T)[:-4].sum()
        torch.testing.assert_close(flow.error(kernel - left @ right), discarded, rtol=1e-6, atol=1e-12)

    def test_factors_are_equally_large(self, shape: tuple[int, int]) -> None:
        left, right = low_rank(torch.randn(shape, generator=generator(), dtype=torch.float64), 4)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))

    def test_a_kernel_of_lower_rank_or_none_at_all_has_finite_factors(self, shape: tuple[int, int]) -> None:
        for kernel in (torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)):
            left, right = low_rank(kernel, 4)
            torch.testing.assert_close(left @ right, kernel)
            assert left.isfinite().all()
            assert right.isfinite().all()


class TestWidths:
    @pytest.mark.parametrize("layer", [conv(64, 96), conv(64, 96, kernel_size=1), linear(64, 96)], ids=str)
    @pytest.mark.parametrize("form", FORMS)
    def test_factors_have_the_share_of_the_weights_that_was_asked_for(self, layer: Layer, form: str) -> None:
        way = LowRank(form=form, ratio=0.3, align=1).sized(layer)
        weights = sum(parameter.numel() for parameter in way.build(layer).parameters()) - 96
        assert weights / layer.weight.numel() == pytest.approx(0.3, rel=0.05)  # ranks are whole numbers

    def test_a_rank_goes_before_the_ratio(self) -> None:
        assert LowRank(rank=24, ratio=0.9).sized(conv(64, 96)).ranks == (24,)
        assert LowRank(form="tucker", rank=24).sized(conv(256, 300)).ranks == (24, 24)

    @pytest.mark.parametrize("layer", [conv(24, 32), conv(24, 32, kernel_size=1), linear(24, 32)], ids=str)
    @pytest.mark.parametrize("form", FORMS)
    def test_the_least_ranks_that_keep_an_energy(self, layer: Layer, form: str) -> None:
        way = LowRank(form=form, energy=0.8, align=1).sized(layer)
        kernel, fewer = matrix(layer.weight), tuple(rank - 1 for rank in way.ranks)
        lost = []
        for ranks in (way.ranks, fewer):
            factors = first_factors(layer.weight.detach().double(), way.form, ranks, None)
            lost.append(float((kernel - composed(way.form, *factors)).square().sum() / kernel.square().sum()))
        assert lost[0] <= 0.2 * len(way.ranks), "each side keeps .8"
        assert lost[1] > 0.2

    def test_all_the_energy_takes_all_ranks(self) -> None:
        assert LowRank(energy=1.0).sized(conv(24, 32)).ranks == (32,)
        assert LowRank(energy=1).sized(linear(24, 32)).ranks == (24,)

    def test_weights_that_are_imagined_have_no_energy(self) -> None:
        with pytest.raises(ConfigError, match=r"student.options.energy: got 0.9"):
            LowRank(energy=0.9).sized(nn.Linear(32, 32, device="meta"))

    @pytest.mark.parametrize("options", [{"ratio": 0.3}, {"energy": 0.3}, {"rank": 4}], ids=str)
    def test_what_is_narrow_stays_whole(self, options: dict[str, Any]) -> None:
        assert LowRank(**options, align=1).sized(linear(64, 10)).ranks == (10,)

    @pytest.mark.parametrize("layer", OTHERS, ids=str)
    def test_what_has_no_two_sides_has_the_channel_form(self, layer: Layer) -> None:
        assert {LowRank(form=form).sized(layer).form for form in FORMS} == {CHANNEL}
        assert LowRank(form=SPATIAL).sized(conv()).form == SPATIAL

    def test_tucker_is_for_wide_layers(self) -> None:
        assert LowRank(form=TUCKER).sized(conv(256, 300)).form == TUCKER
        assert LowRank(form=TUCKER).sized(conv(255, 300)).form == SPATIAL


class Encoder(nn.Module):
    """As in a vision transformer: attention whose projections are read and not run, then two linear layers; and a
    linear layer with a normed kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.normed = parametrizations.weight_norm(nn.Linear(32, 48))
        self.few = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.few(self.normed(x + self.mlp(x)))


def view(module: nn.Module, sample: Tensor, *stay: str) -> View:
    paths = [path for path, _ in module.named_modules() if path not in stay]
    return View("block", module.eval(), sample, (), frozenset(paths), None)


def encoder() -> Encoder:
    torch.manual_seed(SEED)
    return Encoder().eval()


TOKENS = torch.randn(2, 5, 32, generator=generator())


class TestPropose:
    def test_linear_layers_have_factors_where_they_are_run_and_that_pays(self) -> None:
        changes, kept = LowRank().propose(view(encoder(), TOKENS))
        assert changes is not None
        assert list(changes["layers"]) == ["mlp.0", "mlp.2", "normed"]
        assert changes["layers"]["mlp.0"] == {"form": "channel", "ranks": [16]}  # .5 x 4096 / 160 = 12.8
        assert kept == {
            "attention": "a MultiheadAttention reads its weights and runs no layer with them",
            "attention.out_proj": "the network does not run it",
            "few": "its replacement would have 156 parameters for 147",
        }

    def test_layers_whose_weights_are_read_in_eval_mode_alone_stay(self) -> None:
        torch.manual_seed(SEED)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)  # it has a fast path for inference
        changes, kept = LowRank().propose(view(layer, TOKENS))
        assert changes is None
        assert "no attribute 'weight'" in kept["linear1"]
        assert "no attribute 'weight'" in kept["linear2"]

    def test_what_must_stay_is_not_spoken_of(self) -> None:
        changes, kept = LowRank().propose(view(encoder(), TOKENS, "mlp.0", "attention", "normed"))
        assert changes is not None
        assert list(changes["layers"]) == ["mlp.2"]
        assert list(kept) == ["attention.out_proj", "few"]

    def test_the_changes_alone_rebuild_the_student(self) -> None:
        recipe = LowRank(init="teacher")
        changes = json.loads(json.dumps(recipe.propose(view(encoder(), TOKENS))[0]))
        student, again = recipe.student(encoder(), changes, generator()), Encoder()
        replace(recipe, ratio=0.9, align=1, form="spatial").install(again, changes)
        again.load_state_dict(student.state_dict())
        torch.testing.assert_close(again.eval()(TOKENS), student.eval()(TOKENS))

    def test_a_layer_that_is_used_twice_counts_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(32, 32)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(self.layer(x).relu())

        twice = view(Twice(), TOKENS)
        recipe = LowRank(ratio=0.5)
        changes, _ = recipe.propose(twice)
        assert changes is not None
        said = recipe.cost(twice, changes)
        student = recipe.student(twice.module, changes)
        assert said.flops == module_flops(student, TOKENS[:1])
        assert said.params == sum(parameter.numel() for parameter in student.parameters())

    def test_statistics_are_asked_for_where_they_are_used(self) -> None:
        changes, _ = LowRank().propose(view(encoder(), TOKENS))
        assert changes is not None
        assert LowRank().wants(changes) == list(changes["layers"])
        assert LowRank(init="teacher").wants(changes) == LowRank(init="random").wants(changes) == []

    def test_networks_with_something_besides_the_first_layer_suit_it(self) -> None:
        first = nn.Conv2d(3, 8, 3)
        assert not LowRank().suits(nn.Sequential(first, nn.ReLU()), first_layer=False)
        assert LowRank().suits(nn.Sequential(first, nn.ReLU()), first_layer=True)
        assert LowRank().suits(nn.Sequential(first, nn.Conv2d(8, 8, 1)), first_layer=False)
        assert LowRank().suits(nn.Sequential(first, nn.Linear(8, 8)), first_layer=False)
        assert not LowRank().suits(nn.Sequential(first, nn.Conv2d(8, 8, 3, groups=8)), first_layer=False)


class TestFirstWeights:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("norm", [True, False])
    def test_outputs_keep_their_mean(self, form: str, norm: bool) -> None:
        torch.manual_seed(SEED)
        layers: list[nn.Module] = [nn.Conv2d(6, 16, 3, bias=not norm), *([nn.BatchNorm2d(16)] if norm else [])]
        block = nn.Sequential(*layers)
        x = torch.randn(64, 6, 9, 9, generator=generator()) + torch.arange(6.0)[:, None, None]
        block.train()(x)
        block.eval()
        if norm:
            block[1].momentum = None  # what it has seen, and no less
            block[1].reset_running_stats()
            block.train()(x)
            block.eval()
        statistics = gather({"0": block[0]}, [x], block, {"1": block[1]} if norm else {})
        assert statistics["0"].norm == ("1" if norm else None)
        wanted = block(x).mean((0, 2, 3))
        recipe = LowRank(form=form, ratio=0.4, align=1)
        replace_layers(block, {"0": recipe.sized(block[0])}, generator(), statistics)
        torch.testing.assert_close(block(x).mean((0, 2, 3)), wanted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "cp"},
        {"ratio": 0.0},
        {"ratio": 1.5},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 2.0},
        {"align": 0},
        {"init": "zeros"},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"student.options.{name}"):
        LowRank(**options)


def test_a_rank_and_an_energy_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match=r"student.options.energy: got 0.9; expected null, beside a rank"):
        LowRank(rank=8, energy=0.9)
