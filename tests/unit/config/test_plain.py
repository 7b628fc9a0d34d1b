"""Options of what knows no configuration, derived from its sections: by name, with nothing left to a default."""

from dataclasses import dataclass

import pytest

from distill.config.compose import compose
from distill.config.plain import options_of
from distill.config.schema import DistillConfig
from distill.training.optim import TrainerOptions


def test_defaults_of_training_are_those_of_the_configuration() -> None:
    assert options_of(TrainerOptions, DistillConfig(), patience=0, min_delta=0.0) == TrainerOptions()


def test_values_are_taken_by_name_and_choices_by_theirs() -> None:
    section = compose(["distill.optimizer=sgd", "distill.lr=0.5"]).distill
    options = options_of(TrainerOptions, section, patience=2)
    assert (options.optimizer, options.lr, options.patience, options.min_delta) == ("sgd", 0.5, 2, 0.01)


def test_a_field_that_no_setting_is_for_is_not_left_to_its_default() -> None:
    @dataclass
    class Other:
        momentum: float
        nowhere: int = 3

    with pytest.raises(AttributeError, match="nowhere"):
        options_of(Other, DistillConfig())
    assert options_of(Other, DistillConfig(), nowhere=4) == Other(0.9, 4)
