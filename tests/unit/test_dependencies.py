"""What pyproject.toml says is needed, against what the code imports and what the environment was tested with."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: list(map(Requirement, needed)) for name, needed in PROJECT["optional-dependencies"].items()}
CORE = list(map(Requirement, PROJECT["dependencies"]))
OURS = {"distill", "tests", "benchmarks"} | {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
CHOSEN = [requirement for requirement in chain(CORE, *EXTRAS.values()) if requirement.name != "distill"]


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def imports(folder: str) -> dict[str, str]:
    """Top-level package -> one file of the folder that imports it by its name, in a statement or a call."""
    found = {}
    for file in (ROOT / folder).rglob("*.py"):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0]: str(file) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found[node.module.split(".")[0]] = str(file)
        found |= {name.split(".")[0]: str(file) for name in re.findall(r'import_module\("([\w.]+)"\)', text)}
    return {name: file for name, file in found.items() if name not in OURS | set(sys.stdlib_module_names)}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("distill", ("timm", "hf", "onnx", "slurm")), ("tests", tuple(EXTRAS)), ("benchmarks", ("benchmarks",))],
)
def test_every_import_is_of_a_declared_package(folder: str, extras: tuple[str, ...]) -> None:
    declared = names(CORE + [requirement for extra in extras for requirement in EXTRAS[extra]])
    found = imports(folder)
    assert found
    providers = packages_distributions()
    undeclared = {
        name: file
        for name, file in found.items()
        if not declared & {canonicalize_name(provider) for provider in providers.get(name, [name])}
    }
    assert undeclared == {}


@pytest.mark.parametrize("requirement", CHOSEN, ids=str)
def test_every_requirement_has_a_floor_and_allows_the_version_that_is_tested(requirement: Requirement) -> None:
    assert any(specifier.operator == ">=" for specifier in requirement.specifier)
    pins = dict(line.split("==") for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines())
    tested = {canonicalize_name(name): version for name, version in pins.items()}
    assert tested[canonicalize_name(requirement.name)] in requirement.specifier
