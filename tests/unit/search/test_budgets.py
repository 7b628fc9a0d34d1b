"""What a user writes for a budget."""

from __future__ import annotations

import pytest

from distill.errors import ConfigError
from distill.search.budgets import Budget, parse, shown


@pytest.mark.parametrize(
    ("name", "value", "budget"),
    [
        ("params", 0.5, Budget("params", share=0.5)),
        ("params", "0.5", Budget("params", share=0.5)),
        ("params", 1, Budget("params", share=1.0)),
        ("params", 100_000, Budget("params", amount=100_000)),
        ("params", 1e5, Budget("params", amount=100_000)),
        ("params", "100k", Budget("params", amount=100_000)),
        ("params", "1.5M", Budget("params", amount=1_500_000)),
        ("flops", "20MFLOPs", Budget("flops", amount=20e6)),
        ("flops", ".3", Budget("flops", share=0.3)),
        ("bytes", "500 kB", Budget("bytes", amount=500_000)),
        ("bytes", "2KiB", Budget("bytes", amount=2048)),
        ("memory", "3MiB", Budget("memory", amount=3 * 2**20)),
    ],
)
def test_a_number_up_to_one_is_a_share_and_an_amount_has_its_unit(name: str, value: object, budget: Budget) -> None:
    assert parse(name, value) == budget


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("params", 0), ("params", -0.5), ("params", "100kB"), ("params", "100K"), ("params", "half"), ("params", True),
        ("params", float("nan")), ("params", float("inf")), ("params", "50%"), ("params", [0.5]), ("params", ""),
        ("flops", 20e6), ("flops", "20M"), ("bytes", 2), ("bytes", "5 parsecs"), ("bytes", "1e999kB"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"search\.budget\.{name}: .* a share of the teacher's, such as 0\.5"):
        parse(name, value)


def test_a_limit_is_of_the_teacher_s_or_its_own() -> None:
    assert parse("params", 0.25).limit(400.0) == 100.0
    assert parse("params", "100k").limit(400.0) == 100_000


@pytest.mark.parametrize(
    ("name", "amount", "words"),
    [
        ("params", 78042, "78.0 k"), ("params", 12, "12"), ("params", 999_960, "1000 k"), ("bytes", 5e5, "500 kB"),
        ("flops", 2.05e7, "20.5 MFLOPs"), ("flops", 0, "0 FLOPs"), ("latency", 25.2, "25.2 ms"),
        ("latency", 0.0816, "81.6 us"), ("latency", 1.234, "1.23 ms"),
    ],
)  # fmt: skip
def test_amounts_in_words(name: str, amount: float, words: str) -> None:
    assert shown(name, amount) == words
