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
from distill.training.optim import TrainerOptions, learning_rate
from distill.training.trainer import BlockTrainer
from tests.training import CPU, batch, look, module, same_bits, train, trainer, weights


class TestLearningRate:
    def test_cosine_falls_from_the_peak_to_zero(self) -> None:
        options = TrainerOptions(lr=2.0)
        assert learning_rate(0, budget=10, options=options) == 2.0
        assert learning_rate(5, budget=10, options=options) == pytest.approx(1.0)  # half way: half the peak
        assert learning_rate(10, budget=10, options=options) == pytest.approx(0.0)
        assert learning_rate(9, budget=10, options=options) == pytest.approx(1 + math.cos(0.9 * math.pi))

    def test_rises_linearly_over_the_warm_up_and_peaks_after_it(self) -> None:
        options = TrainerOptions(lr=2.0, warmup_steps=4)
        assert [learning_rate(step, budget=10, options=options) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
        assert learning_rate(7, budget=10, options=options) == pytest.approx(1.0)  # half way between 4 and 10

    def test_constant_stays_at_the_peak_after_the_warm_up(self) -> None:
        options = TrainerOptions(lr=2.0, warmup_steps=2, schedule="constant")
        assert [learning_rate(step, budget=5, options=options) for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]

    def test_a_warm_up_longer_than_the_budget_only_rises(self) -> None:
        options = TrainerOptions(lr=1.0, warmup_steps=10)
        assert [learning_rate(step, budget=3, options=options) for step in range(3)] == [0.1, 0.2, 0.3]

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
