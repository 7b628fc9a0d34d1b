"""budget.seconds in the configuration: it decides lengths alone, and the run's identity has it."""

import pytest

from distill.config.compose import compose
from distill.config.fingerprint import identity
from distill.errors import ConfigError

ASKED = "budget.seconds=900"


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("distill.steps=100", "200, its default"),
        ("distill.epochs=1", "null, its default"),
        ("finetune.epochs=4", "2.0, its default"),
        ("finetune.epochs=0", "2.0, its default"),
    ],
)
def test_lengths_are_given_once(override: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([ASKED, override])
    assert str(error.value).startswith(override.split("=", maxsplit=1)[0])
    assert f"{allowed}, where budget.seconds=900 decides that" in str(error.value)
    assert compose([override]).budget.seconds is None


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan"])
def test_a_budget_is_a_time(value: str) -> None:
    with pytest.raises(ConfigError, match=r"budget\.seconds"):
        compose([f"budget.seconds={value}"])


def test_it_is_in_the_identity_where_it_is_given() -> None:
    without, given = identity(compose([])), identity(compose([ASKED]))
    assert {**without, "budget.seconds": 900.0} == given
