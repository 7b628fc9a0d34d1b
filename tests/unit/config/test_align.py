"""student.align follows from the machine where it counts, and only there."""

from dataclasses import fields

import pytest

from distill.config.choices import RECIPES as NAMES
from distill.config.choices import WITHOUT_WIDTHS
from distill.config.compose import compose
from distill.config.fingerprint import identity
from distill.machine import host
from distill.recipes import RECIPES


@pytest.fixture(params=[True, False], ids=["avx512", "avx2"])
def steps(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> int:
    place = tmp_path_factory.mktemp("machine")
    (place / "cpuinfo").write_text(f"flags\t\t: fpu avx2 {'avx512f avx512dq' if request.param else 'fma'}\n")
    monkeypatch.setattr(host, "CPU_FACTS", place / "cpuinfo")
    monkeypatch.setattr(host, "NVIDIA", place / "nothing")
    return 16 if request.param else 8


def test_names_without_widths_are_those_of_recipes_without_the_option() -> None:
    assert set(NAMES) == set(RECIPES)
    having = {name for name, kind in RECIPES.items() if any(field.name == "align" for field in fields(kind))}
    assert set(WITHOUT_WIDTHS) == set(NAMES) - having


@pytest.mark.parametrize("setting", ["student=thin", "student.per_block={layer1.0: {recipe: thin}}"])
def test_it_is_what_kernels_here_are_fast_at(setting: str, steps: int) -> None:
    assert compose(["student.align=null", setting]).student.align == steps
    assert compose(["student.align=4", setting]).student.align == 4


def test_a_gpu_wants_wide_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "NVIDIA", host.CPU_FACTS)
    assert compose(["student=thin"]).student.align == 16


def test_where_no_recipe_has_widths_the_machine_tells_no_jobs_apart(steps: int) -> None:
    config = compose(["data=digits"])
    assert config.student.align is None
    assert "student.align" not in identity(config)
