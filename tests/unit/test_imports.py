"""Which module may import which: dependencies point one way, and what is to run on a laptop needs no torch."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from distill.launch.answers import answer

PACKAGE = Path(__file__).parents[2] / "distill"

# Room, or file beside the rooms -> the rooms that it may import. What a room does within itself is its own.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api", "student", "version"},
    "api": {"blocks", "config", "data", "errors", "job", "reporting", "storage", "student"},
    "__main__": {"config", "deployment", "errors", "job", "launch", "planning", "reporting", "simulation"},
    "job": {
"blocks", "cache", "config", "cuda", "data", "deployment", "distributed", "engine", "errors", "extensions",
        "launch", "machine", "observability", "planning", "profiling", "recipes", "reporting", "search", "simulation",
        "storage",
        "student", "teachers", "training",
    },
    "engine": {
        "blocks", "cache", "data", "distributed", "errors", "observability", "planning", "profiling", "storage",
        "training",
    },
    "deployment": {"blocks", "errors", "recipes", "storage", "student"},
    "student": {"blocks", "data", "errors", "extensions", "profiling", "recipes", "storage", "teachers"},
    "recipes": {"blocks", "errors", "profiling"},
    "simulation": {"errors", "planning", "profiling", "reporting", "storage"},
    "profiling": {"blocks", "cuda", "planning", "training"},
    "training": {"blocks", "cuda", "data", "distributed", "errors", "extensions", "planning", "storage"},
    "distributed": {"blocks", "cuda", "errors", "machine", "observability", "planning"},
    "launch": {"config", "errors", "machine", "observability", "reporting", "storage", "version"},
    "reporting": {"errors", "observability", "planning", "storage"},
    "cache": {"blocks", "errors", "machine", "storage"},
    "config": {"data", "errors", "extensions", "machine", "planning", "search", "storage", "teachers"},
    "teachers": {"blocks", "errors", "extensions", "storage"},
    "data": {"errors", "extensions", "machine", "storage"},
    "observability": {"errors", "storage"},
    "search": {"errors"},
    "storage": {"errors", "machine"},
    "blocks": {"errors"},
    "planning": set(),
    "cuda": set(),
    "machine": set(),
    "extensions": {"errors"},
    "errors": set(),
    "version": set(),
}  # fmt: skip

SETTINGS = {"config", "launch"}  # where configuration objects are seen, besides the job and the entry
WITHOUT_TORCH = (  # what is to run where torch is not, or has not been imported yet
    "config", "deployment/bench", "deployment/measure", "errors", "extensions",
    "launch/answers", "launch/multirun", "launch/provenance", "launch/signals",
    "launch/submitit_jobs", "launch/sweep", "machine", "observability/display", "observability/energy",
    "observability/trace", "planning", "reporting", "search", "simulation/command", "simulation/hardware",
    "simulation/simulator",
    "storage/contents", "storage/differing", "storage/files", "storage/image_files", "storage/lease", "storage/paths",
    "storage/run_directory", "storage/siblings", "engine/rebalance/moves",
)  # fmt: skip
DISTRIBUTED = {"distributed/transport", "distributed/store", "launch/launcher"}


def inside(file: Path) -> str:
    """A file's name in the package, without its suffix: planning/relay/ranges."""
    return str(file.relative_to(PACKAGE).with_suffix(""))


def room(file: Path) -> str:
    """The name of a file's row in the table: the folder it is in, or its own."""
    return inside(file).split("/")[0]


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
ROOMS = sorted({room(file) for file in FILES})


def file_of(name: str) -> Path | None:
    """The file of this package that a dotted name is, or is in; None for another package's."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    paths = [PACKAGE.joinpath(*parts[1:length]) for length in range(len(parts), 0, -1)]
    files = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return next(file for file in files if file.exists())


@cache
def files_imported(file: Path) -> frozenset[Path]:
    """The files of this package that a file imports."""
    return frozenset(found for name in imported(file) if (found := file_of(name)) is not None)


def imports_of(name: str) -> set[str]:
    """The rooms that a room imports, itself left out."""
    return {room(found) for file in FILES if room(file) == name for found in files_imported(file)} - {name}


def test_every_room_has_a_row() -> None:
    assert set(ROOMS) == set(ALLOWED)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_room_imports_exactly_what_the_table_says(name: str) -> None:
    assert imports_of(name) == ALLOWED[name]


def test_arrows_form_no_circle_between_rooms_nor_between_files() -> None:
    order = list(TopologicalSorter(ALLOWED).static_order())
    assert order.index("planning") < order.index("distributed") < order.index("engine") < order.index("job")
    assert len(list(TopologicalSorter({file: files_imported(file) for file in FILES}).static_order())) == len(FILES)


def test_configuration_objects_are_seen_by_the_job_and_the_launcher_only() -> None:
    assert {name for name in ROOMS if imports_of(name) & SETTINGS} <= {"job", "__main__", "api"} | SETTINGS


def test_only_the_entry_imports_the_job() -> None:
    assert {name for name in ROOMS if "job" in imports_of(name)} == {"__main__", "api"}


def test_torch_distributed_is_used_where_ranks_talk_and_nowhere_else() -> None:
    using = {inside(file) for file in FILES if any(name.startswith("torch.distributed") for name in imported(file))}
    assert using == DISTRIBUTED


@pytest.mark.parametrize("start", WITHOUT_TORCH)
def test_what_runs_on_a_laptop_imports_no_torch(start: str) -> None:
    files = [file for file in FILES if inside(file) == start or inside(file).startswith(f"{start}/")]
    assert files
    for file in files:
        assert not any(name.split(".")[0] in {"torch", "torchvision"} for name in imported(file)), file.name


@pytest.mark.parametrize("module", ["launch.launcher", "reporting", "observability.energy.joules"])
def test_importing_it_does_not_import_torch(module: str) -> None:
    program = f"import sys, distill.{module}; sys.stdout.write(str('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False"


def test_a_rank_starts_without_what_few_jobs_use() -> None:
    heavy = ("torchvision", "scipy", "hydra", "torch._dynamo", "torch.utils.tensorboard", "onnx", "onnxruntime", "timm")
    program = f"import sys, distill.job; sys.stdout.write(' '.join(n for n in {heavy} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""


def test_the_version_is_the_package_s() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert answer(["--version"]) == f"distill {project['version']}\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_file_is_ascii_and_opens_with_what_it_does(file: Path) -> None:
    text = file.read_text(encoding="ascii")
    assert ast.get_docstring(ast.parse(text))
