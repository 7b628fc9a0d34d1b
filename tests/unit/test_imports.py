"""Which module may import which: dependencies point one way, and what is to run on a laptop needs no torch."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from distill.answers import answer

PACKAGE = Path(__file__).parents[2] / "distill"
SETTINGS = {
    "choices",
    "config",
    "compose",
    "command_line",
    "answers",
    "fingerprint",
    "launcher",
    "sweep",
    "multirun",
}  # where configuration objects are seen

# Module or subpackage -> those of this package that it may import. What a subpackage does within itself is its own.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"export"},
    "__main__": {
        "answers", "devices", "errors", "forecast", "job", "launcher", "multirun", "plan", "report", "shipped", "sweep",
    },
    "errors": set(),
    "shipped": set(),
    "paths": set(),
    # settings and starting
    "config_errors": {"errors", "teachers"},
    "choices": set(),
    "sources": set(),
    "config_paths": {"sources"},
    "config": {"choices", "config_errors", "config_paths", "errors", "teachers"},
    "contents": {"errors", "files", "image_files"},
    "fingerprint": {"choices", "config", "contents", "errors", "image_files", "paths", "sources"},
    "command_line": {"config", "config_errors", "errors"},
    "compose": {"choices", "command_line", "config", "config_errors", "errors", "files", "paths", "shipped"},
    "answers": {"command_line", "compose", "config", "errors", "sweep"},
    "launcher": {"compose", "config", "errors", "host", "provenance", "stopper"},
    "stopper": set(),
    "provenance": set(),
    "multirun": {
        "choices", "command_line", "compose", "config", "errors", "files", "fingerprint", "launcher", "report",
        "rundir", "stopper", "submitted", "sweep",
    },
    "submitted": set(),
    "sweep": {"command_line", "compose", "config", "config_errors", "errors", "fingerprint"},
    # plans, no torch
    "network": set(),
    "memory": {"network"},
    "plan": {"memory", "network"},
    "takeover": {"memory", "plan"},
    "planning": {"network", "plan"},
    "simulate": {"network", "plan", "planning", "protocol"},
    "devices": {"errors", "network"},
    "forecast": {"devices", "errors", "files", "network", "plan", "planning", "report", "simulate"},
    "protocol": {"plan"},
    "files": {"errors"},
    "differing": set(),
    "rundir": {"differing", "errors", "files", "lease"},
    "lease": {"errors", "files", "host"},
    "siblings": {"errors", "files"},
    "report": {"energy", "errors", "files", "plan", "trace"},
    "progress": set(),
    "trace": {"files"},
    "scalars": set(),
    "device_clock": set(),
    # energy, no torch
    "counters": {"errors"},
    "meter": {"counters", "files"},
    "energy": {"files"},
    # networks and data
    "blocks": set(),
    "cutting": {"blocks", "errors"},
    "chain": {"blocks", "cutting", "errors"},
    "precision": {"blocks"},
    "graphed_teacher": {"blocks", "graphs"},
    "image_files": {"errors"},
    "data": {"errors", "host", "image_files", "paths"},
    "teachers": {"aliases", "errors", "memory_format", "paths"},
    "recipes": {"blocks", "flops"},
    "losses": set(),
    # one block
    "aliases": set(),
    "memory_format": set(),
    "checkpoint": {"aliases", "files"},
    "ledger": {"files"},
    "lanes": set(),
    "graphs": {"lanes"},
    "stopwatch": set(),
    "trainer": {"aliases", "checkpoint", "graphs", "lanes", "losses", "stopwatch"},
    "cost": {"blocks", "flops", "graphs", "trainer"},
    "flops": set(),
    "sizes": {"blocks", "cost"},
    "counting": {"devices", "flops"},
    # between ranks
    "control": {"errors"},
    "transport": {"errors"},
    "cgroups": set(),
    "host": {"cgroups"},
    "edges": {"blocks", "host", "lanes", "network", "protocol", "trace", "transport"},
    "completion": {"control", "errors", "handover", "ledger", "takeover", "trace", "transport"},
    "cache": {"blocks"},
    "cache_places": {"errors", "files", "host"},
    "pace": {"control", "trainer"},
    "handover": {"checkpoint", "control", "errors", "takeover", "trace", "trainer", "transport"},
    "stealing": {"control", "errors", "handover", "pace", "plan", "takeover"},
    "assignments": {"control", "edges", "handover", "pace", "plan", "protocol", "takeover"},
    "streams": {
        "assignments", "blocks", "cache", "cache_places", "completion", "control", "data", "edges", "errors",
        "handover", "memory", "network", "plan", "protocol", "stealing", "takeover", "trace", "transport",
    },
    "engine": {"checkpoint", "ledger", "protocol", "streams", "takeover", "trace", "trainer"},
    "peak_memory": set(),
    "session": {
        "checkpoint", "completion", "engine", "handover", "ledger", "pace", "peak_memory", "plan", "stealing",
        "streams", "takeover", "trainer",
    },
    # the whole student
    "assemble": {"blocks", "recipes"},
    "evaluate": {"aliases", "cost", "data"},
    "export": {"aliases", "checkpoint", "errors", "files", "recipes", "teachers"},
    "programs": {"errors", "export", "files"},
    "shared_norms": {"errors"},
    "finetune": {"aliases", "checkpoint", "data", "losses", "memory_format", "shared_norms", "transport"},
}  # fmt: skip

WITHOUT_TORCH = SETTINGS - {"launcher"} | {
    "config_errors",
    "config_paths",
    "contents",
    "image_files",
    "sources",
    "differing",
    "siblings",
    "paths",
    "provenance",
    "network",
    "plan",
    "memory",
    "planning",
    "simulate",
    "devices",
    "forecast",
    "protocol",
    "takeover",
    "report",
    "errors",
    "files",
    "rundir",
    "lease",
    "shipped",
    "progress",
    "stopper",
    "submitted",
    "trace",
    "host",
    "cgroups",
    "counters",
    "meter",
    "energy",
}
DISTRIBUTED = {"transport", "control", "launcher"}


def unit(file: Path) -> str:
    """The name of a file's row in the table: its module, or the subpackage it is in."""
    inside = file.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


@cache
def imported(file: Path) -> frozenset[str]:
    """Every dotted name that a file imports, wherever in it; `from a import b` counts as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")  # reached through `import torch`
    return frozenset(names)


FILES = sorted(PACKAGE.rglob("*.py"))
UNITS = sorted({unit(file) for file in FILES})


def imports_of(name: str) -> set[str]:
    """The rows of the table that a unit imports, itself left out."""
    found: set[str] = set()
    for file in FILES:
        if unit(file) == name:
            parts = [imported_name.split(".") for imported_name in imported(file)]
            found |= {path[1] for path in parts if path[0] == "distill" and len(path) > 1 and path[1] in UNITS}
    return found - {name}


def test_there_are_modules_and_each_has_a_row() -> None:
    assert len(UNITS) > 30
    assert set(UNITS) - {"job"} == set(ALLOWED)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_module_imports_only_what_it_may(name: str) -> None:
    assert imports_of(name) <= ALLOWED[name]


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_every_allowed_arrow_is_used(name: str) -> None:
    assert ALLOWED[name] <= imports_of(name)


def test_arrows_form_no_circle() -> None:
    order = list(TopologicalSorter(ALLOWED).static_order())
    assert order.index("plan") < order.index("protocol") < order.index("edges") < order.index("engine")


def test_configuration_objects_are_seen_by_the_job_and_the_launcher_only() -> None:
    seeing = {name for name in UNITS if imports_of(name) & SETTINGS}
    assert seeing <= {"job", "__main__"} | SETTINGS
    assert "job" in seeing


def test_only_the_entry_imports_the_job() -> None:
    assert {name for name in UNITS if "job" in imports_of(name)} == {"__main__"}


def test_torch_distributed_is_used_where_ranks_talk_and_nowhere_else() -> None:
    using = {unit(file) for file in FILES if any(name.startswith("torch.distributed") for name in imported(file))}
    assert using == DISTRIBUTED


def test_what_runs_on_a_laptop_imports_no_torch() -> None:
    assert set(UNITS) >= WITHOUT_TORCH
    for file in FILES:
        if unit(file) in WITHOUT_TORCH:
            assert not any(name.split(".")[0] in {"torch", "torchvision"} for name in imported(file)), file.name


@pytest.mark.parametrize("module", ["launcher", "report", "energy"])
def test_importing_it_does_not_import_torch(module: str) -> None:
    program = f"import sys, distill.{module}; sys.stdout.write(str('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False"


def test_the_version_is_the_package_s() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert answer(["--version"]) == f"distill {project['version']}\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_file_is_ascii_and_opens_with_what_it_does(file: Path) -> None:
    text = file.read_text(encoding="ascii")
    assert ast.get_docstring(ast.parse(text))
