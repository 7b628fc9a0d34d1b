"""A bundle measured by its script alone, as on another device, and read back; and `distill bench`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.blocks.cut import Granularity, cut
from distill.deployment.bench import main as bench
from distill.deployment.bundle import Group, write_bundle
from distill.deployment.chains import LatencyTable
from distill.deployment.runtimes import Runtime, runtime_of
from distill.deployment.tables import MeasuredElsewhere
from distill.errors import ConfigError
from tests.unit.deployment.networks import Block, Network

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return runtime_of("onnxruntime", threads=1, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    """A bundle of a network of two blocks with a narrow one for each."""
    folder = tmp_path_factory.mktemp("bundle")
    places = table(runtime)
    calibration = [(piece.what, piece.source) for piece in places.calibration()]
    groups = [Group(4, calibration), Group(1, calibration[:1])]
    for place in (1, 2, 1):
        base, chains = places.chains(place, {"narrow": Block(8)})
        groups.append(Group(4, [("own", base), ("narrow", *chains["narrow"])]))
    assert write_bundle(folder, groups, runtime) == 7, "what comes again is there once"
    return folder


def table(runtime: Runtime, elsewhere: MeasuredElsewhere | None = None) -> LatencyTable:
    torch.manual_seed(0)
    teacher = Network(64, 64).eval()
    chain = cut(teacher, torch.zeros(2, 3, 8, 8), granularity=Granularity.residual)
    return LatencyTable(chain, teacher, runtime, batch=4, timings=elsewhere, limit_s=0.1)


def run(folder: Path, *arguments: str, there: Path) -> subprocess.CompletedProcess[str]:
    """Run the script somewhere else, isolated from this package and from the environment."""
    command = [sys.executable, "-I", str(folder / "measure.py"), "--seconds", "0.1", *arguments]
    return subprocess.run(command, cwd=there, env={}, capture_output=True, text=True, timeout=120, check=False)


def test_the_script_measures_it_alone_and_the_table_takes_the_place_of_measuring(
    bundle: Path, runtime: Runtime, tmp_path: Path
) -> None:
    done = run(bundle, there=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "group 4 of 4, batch 4" in done.stdout, "blocks of the same shape are timed once"
    elsewhere = MeasuredElsewhere(bundle / "table.json")
    assert elsewhere.environment == runtime.environment, "this device, this time"
    there = table(runtime, elsewhere)
    saved = {place: there.difference(place, Block(8)).median_ms for place in (1, 2)}
    assert all(ms < 0 for ms in saved.values())
    assert there.predict({1: Block(8), 2: Block(8)}) == pytest.approx(there.teacher.median_ms + sum(saved.values()))
    with pytest.raises(ConfigError, match=r"deploy.table: .*; expected a table that has other; make the bundle again"):
        there.differences(1, {"other": Block(32)})


def test_files_are_compared_by_the_script_and_by_bench(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "teacher.onnx").write_bytes((bundle / "000.onnx").read_bytes())
    (tmp_path / "student.onnx").write_bytes((bundle / "000.onnx").read_bytes())
    done = run(bundle, "teacher.onnx", "student.onnx", "--batch", "2", "-o", "t.json", there=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "batch 2" in done.stdout
    assert json.loads((tmp_path / "t.json").read_text())["batches"]["2"].keys() == {"teacher.onnx", "student.onnx"}
    assert bench([f"run={tmp_path}", "--batch", "2", "--seconds", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "x as fast as teacher.onnx" in printed
    assert len(printed.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no files; expected run=DIR or ONNX files"),
        (["nowhere.onnx"], "nowhere.onnx: no such file"),
        (["run=nowhere"], "run=nowhere: neither teacher.onnx nor student.onnx is there"),
        ([__file__], "cannot be read as an ONNX program"),
    ],
)
def test_bench_says_in_one_line_what_is_wrong(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench([*arguments, "--batch", "1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("distill bench: ")
    assert words in told
    assert len(told.splitlines()) == 1


def test_a_runtime_that_is_not_there_is_named(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no such thing')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(0, {str(bundle)!r}); import measure"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; sys.exit(measure.main([]))"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "measure.py: onnxruntime cannot be imported here (no such thing): pip install onnxruntime\n"


def test_a_bundle_is_of_onnx_programs(tmp_path: Path) -> None:
    torch_itself = runtime_of("torch", threads=1, precision="fp32", device="cpu")
    with pytest.raises(ConfigError, match=r"deploy.runtime: got 'torch'; expected one of onnxruntime, openvino"):
        write_bundle(tmp_path, [], torch_itself)
