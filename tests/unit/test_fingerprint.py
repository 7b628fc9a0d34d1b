"""Which settings tell two jobs apart."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from distill import choices
from distill import fingerprint as rule
from distill.compose import compose
from distill.config import JobConfig, settings
from distill.fingerprint import fingerprint, identity


@pytest.fixture(scope="module")
def default() -> JobConfig:
    return compose([])


def edited(config: JobConfig, path: str, value: object) -> JobConfig:
    """A copy of the configuration with one setting replaced."""
    changed = copy.deepcopy(config)
    *sections, name = path.split(".")
    owner: Any = changed
    for section in sections:
        owner = getattr(owner, section)
    assert hasattr(owner, name)
    setattr(owner, name, value)
    return changed


UNCHANGED = (
    ("launch.nproc_per_node", 4), ("launch.max_restarts", 3), ("launch.threads_per_rank", 2), ("run.name", "other"),
    ("run.dir", "/elsewhere"), ("plan.window", 9), ("plan.cost", choices.Cost.flops), ("plan.timeout_s", 9.0),
    ("device", choices.Device.cpu), ("stage", choices.Stage.plan), ("checkpoint.every", 7),
    ("data.root", "/elsewhere"), ("data.num_workers", 0), ("distill.log_every", 3), ("plan.teacher_ranks", 2),
    ("plan.strategy", choices.Strategy.auto), ("plan.strategy", choices.Strategy.relay),
    ("distill.cuda_graphs", False),
)  # fmt: skip
CHANGED = (
    ("seed", 1), ("distill.lr", 1e-2), ("distill.steps", 7), ("distill.amp", choices.Amp.bf16), ("student.rank", 3),
    ("plan.wire_dtype", choices.WireDtype.bf16), ("data.batch_size", 3), ("teacher.weights", "file.pt"),
    ("blocks.exclude", ["a"]), ("teacher.options", {"width": 2}), ("finetune.epochs", 9),
    ("assemble.batchnorm_batches", 1), ("plan.strategy", choices.Strategy.ddp), ("teacher.amp", choices.Amp.bf16),
    ("plan.groups", True),
)  # fmt: skip


@pytest.mark.parametrize(("path", "value"), UNCHANGED)
def test_unchanged_by_where_and_how_fast(default: JobConfig, path: str, value: object) -> None:
    changed = edited(default, path, value)
    assert changed != default
    assert fingerprint(changed) == fingerprint(default)


@pytest.mark.parametrize(("path", "value"), CHANGED)
def test_changed_by_what_is_computed(default: JobConfig, path: str, value: object) -> None:
    assert fingerprint(edited(default, path, value)) != fingerprint(default)


def test_a_file_of_weights_is_one_however_its_path_is_typed(
    default: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "teacher.pt").touch()
    (tmp_path / "linked.pt").symlink_to("here/teacher.pt")
    monkeypatch.chdir(tmp_path / "here")

    def typed(weights: str) -> str:
        return fingerprint(edited(default, "teacher.weights", weights))

    whole = str(tmp_path.resolve() / "here" / "teacher.pt")
    assert identity(edited(default, "teacher.weights", "teacher.pt"))["teacher.weights"] == whole
    names = ("teacher.pt", "./teacher.pt", "../here/teacher.pt", "~/here/teacher.pt", "../linked.pt", whole)
    assert len(set(map(typed, names))) == 1
    assert typed("../there/teacher.pt") != typed(whole)
    (tmp_path / "here" / "DEFAULT").mkdir()
    assert identity(edited(default, "teacher.weights", "DEFAULT"))["teacher.weights"] == "DEFAULT"


def test_the_demo_has_the_fingerprint_that_the_readme_shows(default: JobConfig) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert set(re.findall(r"outputs/demo/([0-9a-f]+)", readme)) == {fingerprint(default)}


def test_is_sixteen_hexadecimal_digits(default: JobConfig) -> None:
    assert len(fingerprint(default)) == 16
    assert int(fingerprint(default), 16) >= 0


def test_identity_leaves_out_nothing_but_the_listed_settings(default: JobConfig) -> None:
    left_out = {path for path, *_ in settings()} - identity(default).keys()
    assert left_out
    for path in left_out - {"cache.dtype", "data.exif_orientation"}:
        named = {path, path.split(".")[0]} & rule._NOT_IN_FINGERPRINT
        assert named or path in dict(rule._NOT_IN_FINGERPRINT_AT), path


def test_a_cache_is_told_from_none_and_by_its_precision_but_not_by_its_place(default: JobConfig) -> None:
    def cached(**changes: object) -> str:
        config = edited(edited(default, "distill.views", 2), "teacher.cache", changes.pop("cache", choices.Cache.ram))
        for path, value in changes.items():
            config = edited(config, path.replace("__", "."), value)
        return fingerprint(config)

    assert cached() == cached(cache=choices.Cache.disk) == cached(cache__dir="/x") == cached(cache__max_gib=1.0)
    off = choices.Cache.off
    different = {cached(), cached(cache__dtype=choices.WireDtype.bf16), cached(distill__views=3), cached(cache=off)}
    assert len(different | {fingerprint(default)}) == 5
    assert cached(cache=off) == cached(cache=off, cache__dtype=choices.WireDtype.bf16)


def test_every_entry_left_out_of_the_fingerprint_is_a_setting_or_a_section() -> None:
    paths = {path for path, *_ in settings()}
    sections = {path.rpartition(".")[0] for path in paths}
    assert paths | sections >= rule._NOT_IN_FINGERPRINT


def test_a_setting_that_came_later_is_left_out_where_it_changes_nothing(default: JobConfig) -> None:
    defaults = {path: shown for path, _, shown, _ in settings()}
    for path, value in rule._NOT_IN_FINGERPRINT_AT:
        assert defaults[path] == ("null" if value is None else value)
        assert path not in identity(default)
