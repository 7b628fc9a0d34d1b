"""Every file of a finished run damaged, in every way, and the run started, delivered, loaded and reported again.

Whatever it is, the student comes out with the same bits and the file is named, or the job ends with its name.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.storage.files import json_line, read_json, read_lines, write_json
from tests.e2e.command import FINISHED, SMALL, environment

pytestmark = pytest.mark.jobs

LIMIT_S = 900
JOBS = """
    import contextlib, io, json, logging, sys, traceback
    from distill.job import run_rank
    from distill.reporting.command import main as report
    for kind, arguments in json.load(sys.stdin):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = report(arguments) if kind == "report" else run_rank(arguments)
            except Exception:
                status = 1
                traceback.print_exc()
        for handler in list(logging.getLogger("distill").handlers):
            logging.getLogger("distill").removeHandler(handler)
        print(json.dumps({"status": status, "out": out.getvalue(), "err": err.getvalue()}), flush=True)
"""


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swapped(path: Path) -> None:
    """Put what another run has there: a whole file, but other numbers."""
    if path.suffix == ".safetensors":
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    elif path.suffix == ".jsonl":
        lines = [line for line in read_lines(path) if isinstance(line, dict)]
        path.write_text("".join(json_line(_other(line), path.name) for line in lines))
    elif path.name == "trace.json":  # for other programs: without a checksum
        path.write_text(json.dumps(_other(json.loads(path.read_text()))))
    elif path.suffix == ".json":
        write_json(path, _other(read_json(path)))
    else:
        path.write_text("seed: 999\n")


def _other(value: object) -> object:
    """The same with another run's checksums, accuracies and steps."""
    if isinstance(value, dict):
        return {key: _other(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_other(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,64}", value):
        return value[::-1]
    return value + 1.0 if isinstance(value, float) else value


WAYS: list[Callable[[Path], None]] = [flipped, truncated, emptied, Path.unlink, swapped]
# What a start needs, and has to do again or to write anew where it is damaged; of stages only their records.
NEEDED = (
    "teacher.safetensors", "stages/teacher.json", "blocks/01.safetensors", "ledger.jsonl", "stages/distill.json",
    "assembled.safetensors", "recalibrated.safetensors", "stages/assemble.json", "finetuned.safetensors",
    "stages/finetune.json", "stages/evaluate.json", "student.safetensors", "student.json", "student.pt2",
    "metrics.json", "stages/deliver.json", "identity.json", "generation.json",
)  # fmt: skip
# What nothing is computed from.
SHOWN = (
    "resolved.yaml", "plan.json", "costs.json", "trace.json", "traces/rank0.1.json", "metrics/rank0.jsonl", "lock",
    "logs/rank0.log", "report.html",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    way: Callable[[Path], None]
    kind: str = "start"  # start, deliver, report

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}-{self.way.__name__}"


def cases() -> list[Case]:
    """Every needed file in every way it can be damaged: a start, and in turn a delivery; and the report."""
    found = [Case(name, WAYS[number % len(WAYS)]) for number, name in enumerate(NEEDED)]
    found += [Case(name, WAYS[number % len(WAYS)]) for number, name in enumerate(SHOWN)]
    found += [Case(name, folder) for name in (*NEEDED[::3], "logs/rank0.log")]
    found += [
        Case(name, way, "deliver") for name, way in (("finetuned.safetensors", flipped), ("student.pt2", flipped))
    ]
    found += [Case(name, way, "report") for name in (*NEEDED, *SHOWN[:-1]) for way in (*WAYS, folder)]
    return found


@pytest.fixture(scope="module")
def results(
    finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, tuple[Path, dict[str, str | int]]]:
    """What became of a copy of the finished run in every case; one process runs them all, one after another."""
    base, work, made = tmp_path_factory.mktemp("damaged"), [], {}
    for number, case in enumerate(cases()):
        run = base / str(number)
        shutil.copytree(finished[0], run)
        case.way(run / case.name)
        made[case] = run
        job = [*SMALL, *FINISHED, f"run.dir={run}", *(["stage=deliver"] if case.kind == "deliver" else [])]
        work.append((case.kind, [str(run)] if case.kind == "report" else job))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(JOBS)],
        cwd=base, env=environment(), input=json.dumps(work), capture_output=True, text=True, timeout=LIMIT_S,
        check=True,
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(made), done.stderr
    return {case: (run, one) for (case, run), one in zip(made.items(), told, strict=True)}


def student(run: Path) -> bytes:
    return (run / "student.safetensors").read_bytes()


def words(result: dict[str, str | int]) -> str:
    return f"{result['out']}\n{result['err']}"


@pytest.mark.parametrize("case", [case for case in cases() if case.kind == "start" and case.way is not folder], ids=str)
def test_a_start_comes_to_the_same_student_and_names_what_was_damaged(
    finished: tuple[Path, str], results: dict[Case, tuple[Path, dict[str, str | int]]], case: Case
) -> None:
    run, result = results[case]
    told = words(result)
    assert "Traceback" not in told
    if case.name == "identity.json" and case.way is swapped:
        assert result["status"] == 1
        assert "a run of the same configuration; differing:" in told
        return
    assert result["status"] == 0, told
    if case.name in ("finetuned.safetensors", "stages/finetune.json"):  # a sum over two ranks then, over one now
        assert "stage finetune is done again: " in told or case.way is Path.unlink
        assert "stage deliver is done again: it used another finetuned.safetensors" in told
    else:
        assert student(run) == student(finished[0])
    assert "teacher against student" in told
    removed_record = case.way is Path.unlink and case.name.startswith("stages/")
    if case.name in NEEDED and not removed_record and (case.way is swapped) <= (case.name != "generation.json"):
        assert str(run / case.name) in told
    if case.name.startswith("blocks/"):
        ranks = [line["block"] for line in read_lines(run / "ledger.jsonl") if isinstance(line, dict)]
        assert len(set(ranks)) == 9


@pytest.mark.parametrize("case", [case for case in cases() if case.kind == "start" and case.way is folder], ids=str)
def test_a_folder_in_the_place_of_a_file_is_named(
    results: dict[Case, tuple[Path, dict[str, str | int]]], case: Case
) -> None:
    run, result = results[case]
    assert result["status"] == 1
    assert "Traceback" not in words(result)
    assert str(run / case.name) in str(result["err"])


@pytest.mark.parametrize("case", [case for case in cases() if case.kind == "deliver"], ids=str)
def test_a_delivery_of_what_is_damaged_is_refused_and_of_delivered_files_done_again(
    finished: tuple[Path, str], results: dict[Case, tuple[Path, dict[str, str | int]]], case: Case
) -> None:
    run, result = results[case]
    assert "Traceback" not in words(result)
    if case.name == "student.pt2":
        assert result["status"] == 0
        assert student(run) == student(finished[0])
    else:
        assert result["status"] == 1
        assert f"{run / case.name}: damaged" in str(result["err"])
        assert f"its stage finetune is done again by: python -m distill run={run}" in str(result["err"])


@pytest.mark.parametrize("case", [case for case in cases() if case.kind == "report"], ids=str)
def test_a_report_is_drawn_and_names_what_is_left_out(
    results: dict[Case, tuple[Path, dict[str, str | int]]], case: Case
) -> None:
    run, result = results[case]
    assert result["status"] == 0, words(result)
    assert "Traceback" not in words(result)
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_the_report_of_other_numbers_is_not_drawn(results: dict[Case, tuple[Path, dict[str, str | int]]]) -> None:
    run, result = results[Case("metrics.json", swapped, "report")]
    assert f"{run}/metrics.json: damaged, or another run's" in str(result["err"])
    assert "Damaged files, left out" in (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["student.safetensors", "student.json"])
@pytest.mark.parametrize("way", [*WAYS, folder])
def test_a_damaged_student_is_not_loaded(
    finished: tuple[Path, str], tmp_path: Path, name: str, way: Callable[[Path], None]
) -> None:
    from distill import load_student
    from distill.errors import DistillError

    for file in ("student.safetensors", "student.json"):
        shutil.copy(finished[0] / file, tmp_path)
    assert not any(module.training for module in load_student(tmp_path).modules())
    if (name, way) == ("student.json", swapped):
        card = read_json(tmp_path / name)
        write_json(tmp_path / name, card | {"weights_sha256": card["weights_sha256"][::-1]})
    else:
        way(tmp_path / name)
    with pytest.raises(DistillError, match=name):
        load_student(tmp_path)


def test_swapping_changes_numbers(finished: tuple[Path, str], tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    shutil.copy(finished[0] / path.name, path)
    before = load_file(path)
    swapped(path)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in load_file(path).items())
