"""First weights by least squares, against outputs on drawn inputs and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.least_squares import (
    Flow,
    iterations_for,
    keep_mean,
    minimised,
    norm_of,
    rebase,
    regressed,
    scale_of,
)
from distill.recipes.separable import composed, decouple, fitted


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rows() -> Tensor:
    """Inputs (n, d) of three channels with 3 x 3 taps, whose directions weigh very differently."""
    mixing = torch.randn(27, 27, generator=seeded(), dtype=torch.float64) * torch.logspace(0, -2, 27)
    return torch.randn(4000, 27, generator=seeded(1), dtype=torch.float64) @ mixing + 0.5


@pytest.fixture
def flow(rows: Tensor) -> Flow:
    centred = rows - rows.mean(0)
    scale = torch.linspace(0.1, 2.0, 6, dtype=torch.float64)
    return Flow(rows.mean(0), centred.T @ centred / len(rows), scale)


@pytest.fixture
def kernel() -> Tensor:
    return torch.randn(6, 3, 3, 3, generator=seeded(2), dtype=torch.float64)


def norm(seed: int = 3) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(6).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.copy_(torch.rand(6, generator=seeded(seed), dtype=torch.float64) + 0.5)
    return norm


def test_the_error_is_the_mean_square_of_what_outputs_are_off_by(rows: Tensor, flow: Flow, kernel: Tensor) -> None:
    difference = kernel.flatten(1)
    off = (rows - rows.mean(0)) @ difference.T * flow.scale
    torch.testing.assert_close(flow.error(difference), off.square().sum(1).mean())


def test_a_batch_norm_keeps_its_function_s_mean_and_scale_for_another_kernel(rows: Tensor, kernel: Tensor) -> None:
    before, bias = kernel.flatten(1), torch.arange(6.0, dtype=torch.float64)
    after = before + 0.1 * torch.randn(6, 27, generator=seeded(4), dtype=torch.float64)
    behind = norm()
    centred = rows - rows.mean(0)
    flow = Flow(rows.mean(0), centred.T @ centred / len(rows), scale_of(behind))
    wanted = behind((rows @ before.T + bias)[:, :, None, None]).mean((0, 2, 3))
    slope = scale_of(behind)
    rebase(behind, flow, before, after, bias)
    outputs = (rows @ after.T + bias)[:, :, None, None]
    torch.testing.assert_close(behind(outputs).mean((0, 2, 3)), wanted)
    torch.testing.assert_close(scale_of(behind), slope)
    # And so they last where the statistics are estimated anew.
    torch.testing.assert_close(behind.train()(outputs).mean((0, 2, 3)), wanted)


def test_without_a_batch_norm_the_bias_keeps_the_mean(rows: Tensor, flow: Flow, kernel: Tensor) -> None:
    before = kernel.flatten(1)
    layer = nn.Linear(27, 6).double()
    wanted = (rows @ before.T + layer.bias).mean(0)
    after = layer.weight.detach()
    keep_mean(layer, flow, before, after)
    torch.testing.assert_close((rows @ after.T + layer.bias).mean(0), wanted)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_factors_that_fit_what_flows_lose_less_than_those_of_the_kernel_alone(
    flow: Flow, kernel: Tensor, memory_format: torch.memory_format, rank: int
) -> None:
    depthwise, pointwise = decouple(kernel.to(memory_format=memory_format), rank)
    found = fitted(kernel, depthwise, flow)

    def lost(pair: tuple[Tensor, Tensor]) -> float:
        return float(flow.error(kernel.flatten(1) - composed(pair[0].flatten(1), pair[1].flatten(1), rank)))

    assert lost(found) < 0.7 * lost((depthwise, pointwise))
    # To first order nothing is left to gain.
    free = [factor.clone().requires_grad_() for factor in found]
    flow.error(kernel.flatten(1) - composed(free[0].flatten(1), free[1].flatten(1), rank)).backward()
    size = float(flow.error(kernel.flatten(1)))
    assert all(factor.grad is not None and factor.grad.norm() < 1e-2 * size for factor in free)


def test_the_layer_behind_features_is_that_of_least_squares(rows: Tensor, flow: Flow, kernel: Tensor) -> None:
    features = torch.randn(27, 5, generator=seeded(4), dtype=torch.float64)
    centred = rows - flow.mean
    wanted = torch.linalg.lstsq(centred @ features, centred @ kernel.flatten(1).T).solution.T
    torch.testing.assert_close(regressed(kernel.flatten(1), features, flow), wanted)


def test_a_feature_that_is_always_zero_has_no_weight(flow: Flow, kernel: Tensor) -> None:
    features = torch.eye(27, 5, dtype=torch.float64)
    features[:, 2] = 0
    assert regressed(kernel.flatten(1), features, flow)[:, 2].abs().max() == 0
    assert regressed(kernel.flatten(1), 0 * features, flow).abs().max() == 0


def test_wide_layers_have_a_start_that_fits_what_flows_and_no_steps(
    monkeypatch: pytest.MonkeyPatch, flow: Flow, kernel: Tensor
) -> None:
    assert iterations_for(torch.empty(512, 4608, device="meta")) == 0
    monkeypatch.setattr("distill.recipes.least_squares.MOST_WORK", 0)
    depthwise, pointwise = decouple(kernel, 2)
    pairs = [(depthwise, pointwise), fitted(kernel, depthwise, flow)]
    before, after = (kernel.flatten(1) - composed(d.flatten(1), p.flatten(1), 2) for d, p in pairs)
    assert flow.error(after) < 0.8 * flow.error(before)


def test_a_minimisation_that_finds_nothing_better_gives_its_start(flow: Flow, kernel: Tensor) -> None:
    start = [kernel.flatten(1)]
    (found,) = minimised(start, lambda k: k, kernel.flatten(1), flow, iterations=5)
    assert torch.equal(found, start[0])
    noise = [torch.randn(6, 27, generator=seeded(5), dtype=torch.float64)]
    (unmoved,) = minimised(noise, lambda k: k, kernel.flatten(1), flow, iterations=0)
    assert torch.equal(unmoved, noise[0])


def test_directions_that_no_row_has_shown_still_count(kernel: Tensor) -> None:
    seen = InputStatistics(torch.zeros(27).double(), torch.diag(torch.tensor([1.0] * 5 + [0.0] * 22)).double(), 5)
    flow = Flow.of(seen, kernel, None)
    assert flow.covariance.diagonal().min() > 0
    assert torch.equal(seen.covariance.diagonal()[5:], torch.zeros(22).double())  # what was found is left as it was
    assert torch.equal(flow.scale, torch.ones(6).double())


def test_a_channel_that_a_batch_norm_has_switched_off_counts_a_little() -> None:
    behind = norm()
    behind.weight.data[2] = 0.0
    scale = scale_of(behind)
    assert 0 < scale[2] <= 1.01e-3 * scale.abs().max()


@pytest.mark.parametrize("plain", [nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, track_running_stats=False)])
def test_batch_norms_without_weights_or_statistics_are_none(plain: nn.Module) -> None:
    network = nn.ModuleDict({"plain": plain, "usual": norm()})
    assert norm_of(network, InputStatistics(torch.empty(0), torch.empty(0), 1, "plain")) is None
    assert norm_of(network, InputStatistics(torch.empty(0), torch.empty(0), 1, None)) is None
    assert norm_of(network, InputStatistics(torch.empty(0), torch.empty(0), 1, "usual")) is network["usual"]
