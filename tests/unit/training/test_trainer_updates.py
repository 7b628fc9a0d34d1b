"""One block's updates: their rate, what is read of them, and gradients shared with other ranks."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from distill.planning.unit import Unit
from distill.training.losses import relative_error
from distill.training.optim import FIXED_RATE, RELATIVE_RATE, TrainerOptions, learning_rate, peak_rates
from distill.training.trainer import BlockTrainer
from tests.training import CPU, batch, look, module, same_bits, train, trainer, weights


class TestLearningRate:
    def test_cosine_falls_from_the_peak_to_zero(self) -> None:
        peak, options = 2.0, TrainerOptions()
        assert learning_rate(0, peak=peak, budget=10, options=options) == 2.0
        assert learning_rate(5, peak=peak, budget=10, options=options) == pytest.approx(1.0)  # half way: half the peak
        assert learning_rate(10, peak=peak, budget=10, options=options) == pytest.approx(0.0)
        assert learning_rate(9, peak=peak, budget=10, options=options) == pytest.approx(1 + math.cos(0.9 * math.pi))

    def test_rises_linearly_over_the_warm_up_and_peaks_after_it(self) -> None:
        peak, options = 2.0, TrainerOptions(warmup_steps=4)
        assert [learning_rate(step, peak=peak, budget=10, options=options) for step in range(5)] == [
            0.5,
            1.0,
            1.5,
            2.0,
            2.0,
        ]
        assert learning_rate(7, peak=peak, budget=10, options=options) == pytest.approx(
            1.0
        )  # half way between 4 and 10

    def test_constant_stays_at_the_peak_after_the_warm_up(self) -> None:
        peak, options = 2.0, TrainerOptions(warmup_steps=2, schedule="constant")
        assert [learning_rate(step, peak=peak, budget=5, options=options) for step in range(5)] == [
            1.0,
            2.0,
            2.0,
            2.0,
            2.0,
        ]

    def test_a_warm_up_longer_than_the_budget_only_rises(self) -> None:
        peak, options = 1.0, TrainerOptions(warmup_steps=10)
        assert [learning_rate(step, peak=peak, budget=3, options=options) for step in range(3)] == [0.1, 0.2, 0.3]

    def test_the_rate_is_the_optimizer_s(self) -> None:
        one = trainer(budget=2, lr=0.0, optimizer="sgd")
        before = dict(one.module.named_parameters())["0.weight"].clone()
        train(one, 2)
        assert torch.equal(dict(one.module.named_parameters())["0.weight"], before)


class TestUpdate:
    def test_training_lowers_the_error(self) -> None:
        one = trainer(budget=60, lr=1e-2)
        train(one, 60)
        assert one.finished
        assert one.progress.rel_error_last < 0.5 * one.progress.rel_error_first

    def test_ends_at_the_budget(self) -> None:
        one = trainer(budget=3)
        train(one, 2)
        assert not one.finished
        train(one, 3)
        assert one.finished

    @pytest.mark.parametrize("loss", ["normalized_mse", "mse"])
    def test_readings_hold_the_means_over_their_interval(self, loss: str) -> None:
        one, every = trainer(budget=8, loss=loss, log_every=4), trainer(budget=8, loss=loss, log_every=1)
        coarse, fine = train(one, 8), train(every, 8)
        assert [reading.step for reading in coarse] == [1, 4, 8]
        assert [reading.step for reading in fine] == list(range(1, 9))
        assert coarse[0] == replace(fine[0], seconds=coarse[0].seconds)
        for value in ("loss", "relative_error"):
            expected = sum(getattr(reading, value) for reading in fine[4:]) / 4
            assert getattr(coarse[2], value) == pytest.approx(expected)
        assert one.progress.rel_error_first == fine[0].relative_error
        assert one.progress.rel_error_last == coarse[2].relative_error

    def test_losses_are_read_at_log_intervals_only(self) -> None:
        one = trainer(budget=100, log_every=20)
        with mock.patch.object(BlockTrainer, "read", autospec=True, side_effect=BlockTrainer.read) as read:
            train(one, 100)
        assert read.call_count == 6  # after steps 1, 20, 40, 60, 80, 100

    def test_reading_more_often_does_not_change_the_weights(self) -> None:
        one, two = trainer(log_every=1), trainer(log_every=100)
        train(one, 12)
        train(two, 12)
        assert same_bits(weights(one), weights(two))

    def test_clip_norm_bounds_the_update(self) -> None:
        def moved(**options: Any) -> float:
            one = trainer(budget=1, optimizer="sgd", lr=1.0, momentum=0.0, loss="mse", **options)
            before = nn.utils.parameters_to_vector(one.module.parameters()).detach().clone()
            inputs, targets = batch(0)
            one.update(inputs, 100 * targets)
            return float((nn.utils.parameters_to_vector(one.module.parameters()).detach() - before).norm())

        assert moved() > 1.0
        assert moved(clip_norm=0.01) == pytest.approx(0.01, rel=1e-3)

    def test_bf16_trains_with_float32_weights(self) -> None:
        one, exact = trainer(budget=30, lr=1e-2, amp="bf16"), trainer(budget=30, lr=1e-2)
        train(one, 30)
        train(exact, 30)
        assert {tensor.dtype for tensor in one.module.parameters()} == {torch.float32}
        assert one.progress.rel_error_last == pytest.approx(exact.progress.rel_error_last, rel=0.1)
        assert not same_bits(weights(one), weights(exact))

    def test_with_bf16_nothing_inside_a_block_is_float32_not_even_what_passes_by_the_convolutions(self) -> None:
        seen = []

        class Shortcut(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                output = x + self.conv(x)
                seen.append(output.dtype)
                return output

        one = BlockTrainer(
            Unit.of_block(0, "layer"), Shortcut(), budget=2, device=CPU, options=TrainerOptions(amp="bf16")
        )
        train(one, 1)
        one.look(*batch(1), last=True)
        assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("after", ["update", "read", "look", "checkpoint", "final"])
def test_shared_gradients_are_applied_when_the_weights_are_needed_next_with_the_same_bits(after: str) -> None:
    under_way: list[list[Tensor]] = []

    def average(tensors: list[Tensor]) -> Callable[[], None]:
        means = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.fill_(math.nan)  # whoever uses it before it has its mean shows it
        under_way.append(tensors)

        def finish() -> None:
            for tensor, mean in zip(under_way.pop(), means, strict=True):
                tensor.copy_(mean)

        return finish

    one, alone = (trainer(clip_norm=0.1, log_every=5) for _ in range(2))
    one.share(average)
    for each in (one, alone):
        train(each, 3)
    before = weights(one)
    assert len(under_way) == 1
    assert not torch.equal(before["0.weight"], weights(alone)["0.weight"])
    for each in (one, alone):
        if after == "update":
            each.update(*batch(3))
        elif after == "look":
            look(each, 0.5)
        else:
            getattr(each, after)()
    assert len(under_way) == (after == "update")
    assert same_bits(one.final().weights, alone.final().weights)
    assert one.progress.rel_error_last == alone.progress.rel_error_last


def test_dropout_in_a_block_draws_nothing_so_bits_do_not_depend_on_other_random_numbers() -> None:
    def weights(noise: int) -> dict[str, Tensor]:
        block = nn.Sequential(module(), nn.Dropout(0.5))
        one = BlockTrainer(Unit.of_block(0, "layer"), block, budget=4, device=CPU, options=TrainerOptions())
        for step in range(4):
            torch.randn(noise)
            one.update(*batch(step))
        one.look(*batch(9), last=True)
        return one.final().weights

    quiet, noisy = weights(0), weights(17)
    assert all(torch.equal(quiet[name], noisy[name]) for name in quiet)


def small_weights(size: float) -> nn.Module:
    """A block whose layers differ in size: its first weights are of `size`, and a batch norm makes up for it."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    with torch.no_grad():
        block[0].weight.mul_(size / block[0].weight.square().mean().sqrt())
    return block


def of(block: nn.Module, *, budget: int, **options: Any) -> BlockTrainer:
    how = TrainerOptions(**options)
    return BlockTrainer(Unit.of_block(0, "layer"), block, budget=budget, device=CPU, options=how)


def taught(step: int) -> tuple[Tensor, Tensor]:
    """A batch whose targets are those of the small weights, with the noise that a good start leaves."""
    inputs, noise = batch(step)
    with torch.no_grad():
        return inputs, small_weights(1e-3).train()(inputs) + 0.02 * noise


class TestRatesFromTheStart:
    @pytest.mark.parametrize("budget", [1, 10, 50])
    def test_a_good_start_of_small_weights_is_kept_where_one_rate_for_all_destroys_it(self, budget: int) -> None:
        def after(**options: Any) -> float:
            one = of(small_weights(1e-3), budget=budget, **options)
            for step in range(budget):
                one.update(*taught(step))
            with torch.no_grad():
                inputs, targets = taught(1000)
                return float(relative_error(one.module.train()(inputs), targets))

        start = after(lr=0.0)
        assert after() < 1.2 * start
        assert after(lr=3e-3) > 2 * start

    def test_the_rate_of_a_layer_is_a_share_of_its_first_weights(self) -> None:
        def rates(size: float) -> list[float]:
            one = of(small_weights(size), budget=200)
            group_of = {p: group["peak"] for group in one._optimizer.param_groups for p in group["params"]}
            return [group_of[parameter] for parameter in one.module.parameters()]

        conv, norm, shift, *_ = rates(1 / 256)
        assert (conv, norm, shift) == (RELATIVE_RATE / 256, RELATIVE_RATE, RELATIVE_RATE)  # a bias moves as its layer
        assert rates(1 / 16)[0] == 16 * conv
        assert rates(1 / 16)[1:] == rates(1 / 256)[1:]

    def test_short_budgets_have_lower_rates(self) -> None:
        def rate(budget: int) -> float:
            return max(peak_rates(small_weights(1.0), budget=budget, options=TrainerOptions()))

        assert rate(50) == pytest.approx(rate(200) / 2)
        assert rate(1) == pytest.approx(rate(200) / math.sqrt(200))
        assert rate(200) == rate(10_000)

    def test_a_layer_of_zeros_has_the_fixed_rate(self) -> None:
        layer = nn.Linear(2, 2)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        assert [*peak_rates(layer, budget=9, options=TrainerOptions())] == [FIXED_RATE]

    @pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
    def test_other_optimizers_have_the_fixed_rate(self, optimizer: str) -> None:
        assert [*peak_rates(module(), budget=9, options=TrainerOptions(optimizer=optimizer))] == [FIXED_RATE]

    def test_a_number_is_everyones_in_one_group(self) -> None:
        one = trainer(lr=0.003)
        (group,) = one._optimizer.param_groups
        assert group["params"] == [*one.module.parameters()]
        assert [reading.lr for reading in train(one, 1)] == [0.003]

    def test_weights_in_two_layers_train_once(self) -> None:
        block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        block[1].weight = block[0].weight
        found = [p for group in peak_rates(block, budget=9, options=TrainerOptions()).values() for p in group]
        assert len(found) == len({*block.parameters()}) == 3

    def test_what_is_read_is_the_rate_of_the_most_weights(self) -> None:
        one = of(small_weights(1 / 256), budget=200)
        (reading,) = train(one, 1)
        assert reading.lr == RELATIVE_RATE / 256

    def test_the_same_bits_resumed_though_weights_have_grown_meanwhile(self) -> None:
        whole, one, two = (of(small_weights(1e-3), budget=12) for _ in range(3))
        train(whole, 12)
        train(one, 5)
        state = one.checkpoint()
        assert state is not None
        two.resume(state)
        train(two, 12)
        assert same_bits(weights(two), weights(whole))
