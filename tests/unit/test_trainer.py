"""One block's training: rate, updates, readings, looks, divergence, and going on from a checkpoint."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from distill.checkpoint import Checkpoint, CheckpointFolder
from distill.graphs import Lane
from distill.trainer import BlockTrainer, Reading, TrainerOptions, learning_rate

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are not worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module(*, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    return block.to(memory_format=torch.channels_last) if channels_last else block


def trainer(budget: int = 12, *, channels_last: bool = False, block: int = 0, **options: Any) -> BlockTrainer:
    return BlockTrainer(
        block,
        "layer",
        module(channels_last=channels_last),
        budget=budget,
        device=CPU,
        options=TrainerOptions(**options),
    )


def batch(step: int, *, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, a pure function of it."""
    inputs = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    if channels_last:
        inputs = inputs.to(memory_format=torch.channels_last)
    return inputs, torch.tanh(inputs).roll(1, dims=1)


def train(one: BlockTrainer, stop: int, *, channels_last: bool = False) -> list[Reading]:
    """Train up to step `stop`; return what was read."""
    readings = [one.update(*batch(step, channels_last=channels_last)) for step in range(one.step, stop)]
    return [reading for reading in readings if reading is not None]


def weights(one: BlockTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.module.state_dict().items()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


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

    def test_an_update_that_is_never_captured_keeps_its_inputs_until_its_end(self) -> None:
        class Side(Lane):
            captures = True  # type: ignore[assignment]
            let_go = mock.Mock(side_effect=lambda: moved.append(not same_bits(weights(one), before)))

        moved: list[bool] = []
        options = TrainerOptions(optimizer="rmsprop")
        one = BlockTrainer(0, "layer", module(), budget=5, device=CPU, options=options, lane=Side())
        before = weights(one)
        train(one, 1)
        assert moved == [True]

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

        one = BlockTrainer(0, "layer", Shortcut(), budget=2, device=CPU, options=TrainerOptions(amp="bf16"))
        train(one, 1)
        one.look(*batch(1), last=True)
        assert seen == [torch.bfloat16] * 2


class TestResume:
    @pytest.mark.parametrize("channels_last", [False, True], ids=["plain", "channels_last"])
    @pytest.mark.parametrize(
        "options",
        [
            {"optimizer": "adam", "warmup_steps": 6},
            {"optimizer": "sgd", "weight_decay": 1e-3},
            {"optimizer": "rmsprop"},
        ],
        ids=lambda options: options["optimizer"],
    )
    def test_resumed_at_any_step_the_weights_are_bitwise_those_of_one_go(
        self, options: dict[str, Any], channels_last: bool, tmp_path: Any
    ) -> None:
        whole = trainer(channels_last=channels_last, **options)
        train(whole, 12, channels_last=channels_last)
        for stop in (1, 5, 11):
            folder = CheckpointFolder(tmp_path / str(stop), generation=1)
            one, two = (trainer(channels_last=channels_last, **options) for _ in range(2))
            train(one, stop, channels_last=channels_last)
            state = one.checkpoint()
            assert state is not None
            folder.save(state)
            loaded = folder.load(state.name)
            assert loaded is not None
            two.resume(loaded)
            assert two.step == stop
            train(two, 12, channels_last=channels_last)
            assert same_bits(weights(two), weights(whole))

    def test_checkpointing_does_not_change_the_weights(self) -> None:
        one, two = trainer(), trainer()
        for step in range(12):
            one.update(*batch(step))
            one.checkpoint()
        train(two, 12)
        assert same_bits(weights(one), weights(two))

    def test_a_checkpoint_is_not_changed_by_later_training(self) -> None:
        one = trainer()
        train(one, 3)
        state = one.checkpoint()
        assert state is not None
        kept = {name: tensor.clone() for name, tensor in state.weights.items()}
        momenta = {name: tensor.clone() for name, tensor in state.optimizer.items()}
        train(one, 6)
        assert same_bits(state.weights, kept)
        assert same_bits(state.optimizer, momenta)
        assert not same_bits(weights(one), kept)

    def test_progress_goes_on(self) -> None:
        one, two = trainer(), trainer()
        train(one, 6)
        state = one.checkpoint()
        assert state is not None
        two.resume(state)
        train(two, 12)
        assert two.progress.rel_error_first == one.progress.rel_error_first
        assert two.progress.seconds > one.progress.seconds


def poisoned(one: BlockTrainer, *, at: int, stop: int) -> None:
    """Train, with inputs that are not a number at step `at`."""
    for step in range(one.step, stop):
        inputs, targets = batch(step)
        one.update(inputs * math.nan if step == at else inputs, targets)
        if one.finished:
            return


class TestDivergence:
    def test_the_step_of_the_first_bad_loss_is_named_and_the_block_ends(self) -> None:
        one = trainer(budget=100, log_every=10)
        poisoned(one, at=23, stop=100)
        assert one.diverged_at == 23
        assert one.finished
        assert one.step == 30  # seen at the next reading

    def test_delivers_the_last_finite_checkpoint_with_its_progress(self) -> None:
        one = trainer(budget=100, log_every=10)
        train(one, 20)
        state = one.checkpoint()
        assert state is not None
        poisoned(one, at=23, stop=100)
        final = one.final()
        assert final is state
        assert final.step == 20
        assert all(tensor.isfinite().all() for tensor in final.weights.values())
        assert one.progress.rel_error_last == pytest.approx(state.progress["rel_error_last"])

    def test_without_a_checkpoint_the_first_weights_are_delivered(self) -> None:
        one = trainer(budget=100, log_every=10)
        first = weights(one)
        poisoned(one, at=0, stop=100)
        assert (one.diverged_at, one.final().step) == (0, 0)
        assert same_bits(one.final().weights, first)

    def test_after_resuming_the_checkpoint_is_what_is_left(self) -> None:
        one, two = trainer(budget=100, log_every=10), trainer(budget=100, log_every=10)
        train(one, 20)
        state = one.checkpoint()
        assert state is not None
        two.resume(state)
        poisoned(two, at=23, stop=100)
        assert two.diverged_at == 23
        assert same_bits(two.final().weights, state.weights)

    def test_a_checkpoint_of_bad_weights_is_refused_and_the_divergence_noticed(self) -> None:
        one = trainer(budget=100, log_every=50)
        poisoned(one, at=3, stop=7)
        assert one.diverged_at is None  # not read yet
        assert one.checkpoint() is None
        assert one.diverged_at == 3
        assert one.finished

    def test_weights_that_the_last_step_made_infinite_are_not_delivered(self) -> None:
        one = trainer(budget=2)
        train(one, 2)
        with torch.no_grad():
            next(one.module.parameters()).fill_(math.inf)
        final = one.final()
        assert one.diverged_at == 2
        assert final.step == 0
        assert all(tensor.isfinite().all() for tensor in final.weights.values())

    def test_an_undisturbed_block_delivers_its_last_state(self) -> None:
        one = trainer(budget=3)
        train(one, 3)
        assert one.final().step == 3
        assert one.diverged_at is None
        assert same_bits(one.final().weights, weights(one))


def look(one: BlockTrainer, error: float) -> None:
    """A look of one batch whose relative error is `error`: the targets are the outputs and a controlled difference."""
    inputs, _ = batch(1000)
    one.module.eval()
    with torch.no_grad():
        outputs = one.module(inputs)
    one.module.train()
    difference = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5))
    # |difference|^2 / var(outputs + difference) grows from 0 with the scale: bisect for the error asked for.
    low, high = 0.0, 1e3
    for _ in range(60):
        scale = (low + high) / 2
        found = float((scale * difference).square().mean() / (outputs + scale * difference).var(correction=0))
        low, high = (scale, high) if found < error else (low, scale)
    one.look(inputs, outputs + low * difference, last=True)


class TestPlateau:
    def test_stops_after_patience_looks_without_improvement_and_not_before(self) -> None:
        one = trainer(budget=1000, patience=3, min_delta=0.1)
        stopped = []
        for error in (0.5, 0.4, 0.39, 0.38, 0.37):  # from 0.4 on none is 10 % better than the best
            look(one, error)
            stopped.append(one.stopped_early)
        assert stopped == [False, False, False, False, True]
        assert one.finished

    def test_an_improvement_starts_the_count_anew(self) -> None:
        one = trainer(budget=1000, patience=2, min_delta=0.1)
        for error in (0.5, 0.49, 0.3, 0.29):
            look(one, error)
        assert not one.stopped_early
        assert one.progress.looks_without_improvement == 1
        assert one.progress.best_held_out == pytest.approx(0.3, rel=1e-3)
        assert one.progress.rel_error_held_out == pytest.approx(0.29, rel=1e-3)

    def test_without_patience_it_never_stops(self) -> None:
        one = trainer(budget=1000, patience=0)
        for _ in range(5):
            look(one, 0.5)
        assert not one.finished

    def test_a_look_averages_its_batches(self) -> None:
        one = trainer(budget=1000, patience=1)
        inputs, targets = batch(0)
        one.look(inputs, targets, last=False)
        assert one.progress.rel_error_held_out is None
        one.look(*batch(1), last=True)
        single = []
        for step in (0, 1):
            other = trainer(budget=1000, patience=1)
            other.look(*batch(step), last=True)
            single.append(other.progress.rel_error_held_out)
        assert one.progress.rel_error_held_out == pytest.approx(sum(single) / 2)

    def test_a_look_changes_neither_weights_nor_statistics(self) -> None:
        one = trainer(budget=1000)
        train(one, 2)
        before = weights(one)
        one.look(*batch(7), last=True)
        assert same_bits(weights(one), before)
        assert one.module.training

    def test_the_count_of_looks_survives_a_restart(self) -> None:
        one, two = (trainer(budget=1000, patience=2, min_delta=0.1) for _ in range(2))
        look(one, 0.5)
        look(one, 0.49)
        state = one.checkpoint()
        assert state is not None
        two.resume(state)
        look(two, 0.48)
        assert two.stopped_early


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


def test_a_checkpoint_names_its_block_and_step() -> None:
    one = trainer(block=7)
    train(one, 3)
    state = one.checkpoint()
    assert isinstance(state, Checkpoint)
    assert (state.name, state.step) == ("07", 3)


def test_dropout_in_a_block_draws_nothing_so_bits_do_not_depend_on_other_random_numbers() -> None:
    def weights(noise: int) -> dict[str, Tensor]:
        block = nn.Sequential(module(), nn.Dropout(0.5))
        one = BlockTrainer(0, "layer", block, budget=4, device=CPU, options=TrainerOptions())
        for step in range(4):
            torch.randn(noise)
            one.update(*batch(step))
        one.look(*batch(9), last=True)
        return one.final().weights

    quiet, noisy = weights(0), weights(17)
    assert all(torch.equal(quiet[name], noisy[name]) for name in quiet)
