"""One block's checkpoints, and going on from them."""

from typing import Any

import pytest

from distill.storage.checkpoint import Checkpoint, CheckpointFolder
from tests.training import batch, same_bits, train, trainer, weights


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


def test_a_checkpoint_names_its_block_and_step() -> None:
    one = trainer(block=7)
    train(one, 3)
    state = one.checkpoint()
    assert isinstance(state, Checkpoint)
    assert (state.name, state.step) == ("07", 3)
