"""Names of things: the package's own, those that other packages bring, and package.module:attribute."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from distill import extensions
from distill.errors import ConfigError
from distill.extensions import module_of, named, refuse_unknown

OWN: Mapping[str, object] = {"mse": 1, "normalized_mse": 2}
GROUP = "distill.losses"


def huber() -> None:
    """Stands for a thing from outside."""


@pytest.fixture(autouse=True)
def brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that brings a loss, and another of an own name."""
    points = EntryPoints(EntryPoint(name, f"{__name__}:huber", GROUP) for name in ("huber", "mse"))
    monkeypatch.setattr(extensions, "entry_points", points.select)


def test_an_own_name_goes_first_then_entry_points_then_a_module() -> None:
    assert named("distill.loss", "mse", OWN, GROUP) == 1
    assert named("distill.loss", "huber", OWN, GROUP) is huber
    assert named("distill.loss", f"{__name__}:huber", OWN, GROUP) is huber
    assert named("distill.loss", f"{__name__}:Path.cwd", OWN, GROUP) == Path.cwd


def test_the_module_that_a_thing_comes_from_is_known_without_importing_it() -> None:
    assert module_of("mse", OWN, GROUP) is None
    assert module_of("huber", OWN, GROUP) == __name__
    assert module_of("no.such:thing", OWN, GROUP) == "no.such"
    assert module_of("nothing", OWN, GROUP) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hubber", r"'huber' .the nearest.*mse, normalized_mse, huber; or .package.module:attribute"),
        ("a:b:c", "one colon"),
        (":b", "one colon"),
        ("no_such_package:f", "No module named 'no_such_package'"),
        (f"{__name__}:hubber", r"an attribute of .*'huber' .the nearest"),
    ],
)
def test_what_names_nothing_says_what_there_is(value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        named("distill.loss", value, OWN, GROUP)
    assert caught.value.setting == "distill.loss"


def test_what_a_module_raises_while_it_is_imported_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaking.py").write_text("raise RuntimeError('first\\nsecond')\n")
    monkeypatch.syspath_prepend(tmp_path)
    refuse_unknown("distill.loss", "breaking:loss", OWN, GROUP)  # looks at the name alone
    with pytest.raises(ConfigError, match=r"can be imported \(RuntimeError: first\)$"):
        named("distill.loss", "breaking:loss", OWN, GROUP)
