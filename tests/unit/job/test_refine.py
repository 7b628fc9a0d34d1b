"""Which students can be refined, and that a break changes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from distill.config.compose import compose
from distill.errors import ConfigError
from distill.job.blocks import Blocks
from distill.job.refine import refuse_unrefinable

BOTTOM_UP = ("refine=progressive", "refine.order=bottom_up")


def blocks(*, divisible: bool = True, gives: tuple[tuple[int, ...], ...] | None = None) -> Blocks:
    units = {0: SimpleNamespace(name="layer1.0", gives=gives), 1: SimpleNamespace(name="layer1.1", gives=None)}
    return cast(Blocks, SimpleNamespace(chain=SimpleNamespace(divisible=divisible), units=units))


@pytest.mark.parametrize(
    ("overrides", "cut", "words"),
    [
        (
            BOTTOM_UP,
            blocks(divisible=False),
            "refine.method: got 'progressive'; expected off: this network is run thro",
        ),
        (
            BOTTOM_UP,
            blocks(gives=((0,),)),
            "refine.order: got 'bottom_up'; expected together: .* that layer1.0 give; or",
        ),
        (
            ("refine=progressive", "data.batch_size=2"),
            blocks(),
            "data.batch_size: got 2; expected at least 3, an image for each rank that refines",
        ),
    ],
)
def test_what_cannot_be_refined_is_refused_before_anything_runs(
    overrides: tuple[str, ...], cut: Blocks, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        refuse_unrefinable(compose(overrides), cut, world_size=3)


@pytest.mark.parametrize(
    ("overrides", "cut"),
    [
        ((), blocks(divisible=False)),
        ((*BOTTOM_UP, "stage=distill"), blocks(divisible=False)),
        ((*BOTTOM_UP, "refine.whole_weight=0"), blocks(gives=((0,),))),
        (("refine=progressive",), blocks(gives=((0,),))),
    ],
)
def test_everything_else_is_welcome(overrides: tuple[str, ...], cut: Blocks) -> None:
    refuse_unrefinable(compose(overrides), cut, world_size=3)
