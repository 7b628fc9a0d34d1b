"""The two images have what the package is built from, and run the same. Neither is built here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
DOCKERFILE = (LAUNCH / "Dockerfile").read_text()


def apptainer() -> dict[str, object]:
    """The definition's sections as spython reads them."""
    from spython.main.parse.parsers import SingularityParser

    recipe = SingularityParser(str(LAUNCH / "distill.def")).parse()
    return vars(recipe["spython-base"] if isinstance(recipe, dict) else recipe)


def copied_by_docker() -> set[str]:
    lines = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    return {source for line in lines for source in line.split()}


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, LAUNCH / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_both_copy_the_same_files_which_are_all_that_a_build_needs() -> None:
    pairs = [line.split() for line in set(apptainer()["files"])]  # type: ignore[call-overload]
    assert all(target == f"/opt/distill/{source}" for source, target in pairs)
    assert {source for source, _ in pairs} == copied_by_docker()
    assert all((LAUNCH.parent / source).exists() for source in copied_by_docker())
    assert {"pyproject.toml", "README.md", "LICENSE", "conf", "slurm", "distill"} <= copied_by_docker()


def test_both_start_from_one_image_install_by_one_script_and_run_the_command() -> None:
    definition = apptainer()
    assert f"FROM {definition['fromHeader']}\n" in DOCKERFILE
    assert 'RUN launch/container.sh "$CPU_WHEELS"\n' in DOCKERFILE
    assert set(definition["install"]) == {'/opt/distill/launch/container.sh "{{ CPU_WHEELS }}"'}  # type: ignore[call-overload]
    assert 'ENTRYPOINT ["python", "-m", "distill"]\n' in DOCKERFILE
    assert definition["cmd"] == 'exec python -m distill "$@"'


@pytest.mark.parametrize("index", ["", "https://wheels.example/cpu"])
def test_an_index_of_wheels_for_cpus_is_asked_too_where_one_is_given(tmp_path: Path, index: str) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    command, path = ["sh", str(LAUNCH / "container.sh"), index], f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, timeout=30, check=True)
    printed = done.stdout.splitlines()
    assert printed[:3] == ["-m", "pip", "install"]
    assert printed[-1] == ".[hf,onnx,timm]"
    assert [word for word in printed if "index" in word] == ([f"--extra-index-url={index}"] if index else [])
