"""How one block's training ends before its budget: on a loss that is not finite, or on a plateau."""

import math

import pytest
import torch

from distill.training.trainer import BlockTrainer
from tests.training import batch, look, same_bits, train, trainer, weights


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
