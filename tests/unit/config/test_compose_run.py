"""`run=DIR`: a run's own configuration is where a command starts from, and single settings go on top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill.config.choices import Stage
from distill.config.compose import compose
from distill.config.fingerprint import identity
from distill.config.load import to_yaml
from distill.errors import ConfigError
from distill.storage.files import write_commented

OF_RUN = ("teacher=resnet18", "data=cifar10", "data.root=/images", "seed=3", "launch.nproc_per_node=4")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with = and , in its path, as sweeps make them."""
    folder = tmp_path_factory.mktemp("runs") / "seed=3,rank=2"
    folder.mkdir()
    config = compose([*OF_RUN, "stage=plan", "run.dir=elsewhere"])
    write_commented(folder / "resolved.yaml", to_yaml(config))
    return str(folder)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


def test_it_is_the_run_s_configuration_in_that_directory(run: str) -> None:
    config = compose([f"run={run}"])
    assert config.run.dir == run
    assert config.launch.nproc_per_node == 4
    assert identity(config) == identity(compose(OF_RUN))
    assert identity(config) != identity(compose([]))


def test_how_far_it_goes_is_asked_anew(run: str) -> None:
    assert compose([f"run={run}"]).stage is Stage.all
    assert compose([f"run={run}", "stage=deliver"]).stage is Stage.deliver


def test_where_its_nodes_met_is_asked_anew(run: str, tmp_path: Path) -> None:
    of_nodes = compose([*OF_RUN, "launch.nnodes=2", "launch.rdzv_endpoint=gone:29999", "launch.local_addr=n1"])
    write_commented(tmp_path / "resolved.yaml", to_yaml(of_nodes))
    assert compose([f"run={tmp_path}"]).launch == compose([f"run={run}"]).launch


@pytest.mark.parametrize("first", [True, False])
def test_single_settings_go_on_top_wherever_they_stand(run: str, first: bool) -> None:
    settings = ["launch.nproc_per_node=1", "data.root=/there", "+teacher.options.zero_init_residual=true"]
    config = compose([f"run={run}", *settings] if first else [*settings, f"run={run}"])
    assert config.launch.nproc_per_node == 1
    assert config.data.root == "/there"
    assert config.teacher.options == {"zero_init_residual": True}
    assert config.seed == 3


@pytest.mark.parametrize("override", ["teacher=resnet50", "student=separable_x2", "data=digits", "experiment=mine"])
def test_a_group_is_refused(run: str, override: str) -> None:
    group, _, choice = override.partition("=")
    told = refusal(f"run={run}", override)
    assert told.startswith(f"{group}: got '{choice}'; expected single settings")


def test_mistakes_are_explained_as_usual(run: str) -> None:
    assert "'distill.lr' (the nearest)" in refusal(f"run={run}", "distill.lrr=1")
    assert "'distill.lr' (the nearest)" in refusal(f"run={run}", "+distill.lrr=1")
    assert refusal(f"run={run}", "distill.steps=-1").startswith("distill.steps: got -1")
    assert refusal(f"run={run}", "seed=three").startswith("seed: got 'three'; expected an integer")
    assert "'deliver' (the nearest)" in refusal(f"run={run}", "stage=delivr")


@pytest.mark.parametrize("folder", ["", "nowhere", "."])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(f"run={folder}").startswith(f"run: got '{folder}'; expected a run directory")


@pytest.mark.parametrize("content", ["distill: {stepz: 3}", "a: [", "seed: three", "\x00"])
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    write_commented(tmp_path / "resolved.yaml", content)
    told = refusal(f"run={tmp_path}")
    assert told.startswith(f"run: got '{tmp_path}'; expected a run that this version can read")


@pytest.mark.parametrize("damage", [lambda text: text.replace("seed: 3", "seed: 4"), lambda text: text[:-30]])
def test_a_configuration_that_is_damaged_or_edited_is_refused(
    run: str, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    (tmp_path / "resolved.yaml").write_text(damage((Path(run) / "resolved.yaml").read_text()))
    assert f"{tmp_path}/resolved.yaml: damaged, or edited" in refusal(f"run={tmp_path}")


def test_paths_mean_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "sets").mkdir(parents=True)
    (here / "net.pt").touch()
    (here / "zoo.py").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(here)
    given = [
        "teacher=custom",
        "teacher.factory=zoo:net",
        "teacher.weights=net.pt",
        "data=imagefolder",
        "cache.dir='~/kept'",
    ]
    config = compose([*given, "data.root=sets/pets", "run.dir=run"])
    assert config.teacher.weights == str(here / "net.pt")
    assert config.teacher.folder == str(here)
    assert config.data.root == str(here / "sets" / "pets")
    assert config.cache.dir == "~/kept", "which is the same from anywhere"
    assert config.run.dir == str(here / "run")
    (here / "run").mkdir()
    write_commented(here / "run" / "resolved.yaml", to_yaml(config))
    monkeypatch.chdir("/")
    assert compose([f"run={here}/run"]) == config


@pytest.mark.parametrize(
    ("root", "whole"), [("sets", True), ("./none", True), ("a/b/c", True), ("x.parquet", True), ("owner/set", False)]
)
def test_a_set_on_the_hub_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, whole: bool) -> None:
    (tmp_path / "sets").mkdir()
    monkeypatch.chdir(tmp_path)
    assert compose(["data=hf", f"data.root={root}"]).data.root == (str(tmp_path / root) if whole else root)


def test_published_weights_are_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(["teacher=resnet50", "teacher.weights=DEFAULT"]).teacher.weights == "DEFAULT"
    (tmp_path / "DEFAULT").touch()
    assert compose(["teacher=resnet50", "teacher.weights=DEFAULT"]).teacher.weights == str(tmp_path / "DEFAULT")
