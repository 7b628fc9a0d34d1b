"""User mistakes: the message names the setting, what was given and what is allowed; nothing is left half-written."""

from __future__ import annotations

import logging
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.job import memory as job_memory
from distill.job import run_rank
from distill.teachers import build_architecture
from tests.e2e.command import SMALL, distill, environment

FROM_ARGUMENTS = "import sys; from distill.job import run_rank; sys.exit(run_rank(sys.argv[1:]))"


@pytest.fixture(autouse=True)
def _undo_what_a_rank_does_to_its_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    close_logs()


def close_logs() -> None:
    """Detach the log files that a rank attached to this process."""
    logger = logging.getLogger("distill")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.propagate = True


def told(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Run one rank in this process; return what it says on standard error."""
    assert run_rank([*SMALL, "run.dir=run", *overrides]) == 1
    error = capsys.readouterr().err
    assert error.startswith("distill: ")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("distil.steps=3",), ("distil", "does not exist", "'distill' (the nearest)")),
        (("+distill.stepz=3",), ("distill.stepz", "does not exist", "'distill.steps' (the nearest)")),
        (("distill.steps=-1",), ("distill.steps", "-1", ">= 0")),
        (("plan.strategy=fastest",), ("plan.strategy", "fastest", "broadcast")),
        (("plan.groups=true",), ("plan.groups", "True", "false with plan.strategy=broadcast")),
        (("plan.strategy=relay", "plan.teacher_ranks=1"), ("plan.teacher_ranks", "1", "null with plan.strategy=relay")),
        (("teacher.weights=nowhere.pt",), ("teacher.weights", "nowhere.pt", "exists")),
        (("data=imagefolder", "data.root=nowhere"), ("data.root", "nowhere", "folder")),
        (("data=hf", "data.root=nowhere.parquet"), ("data.root", "nowhere.parquet")),
        (("teacher.fit.epochs=0",), ("teacher.weights", "None", "teacher.fit.epochs > 0")),
    ],
)
def test_wrong_settings_are_told_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    error = told(capsys, *overrides)
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize(
    "overrides",
    [("distill.steps=-1",), ("data=imagefolder", "data.root=nowhere"), ("device=cuda",), ("blocks.include=[nothing]",)],
)
def test_a_refused_job_leaves_no_run_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    if overrides == ("device=cuda",) and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    told(capsys, *overrides)
    assert list(tmp_path.iterdir()) == []


def test_teachers_that_are_not_finite_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10, factory=None, options={})
    state = weights.state_dict()
    state["layer2.0.conv1.weight"][0] = torch.nan
    save_file(state, tmp_path / "spoilt.safetensors")
    error = told(capsys, "teacher.weights=spoilt.safetensors", "teacher.fit.epochs=0")
    assert "spoilt.safetensors'; expected finite numbers; layer2.0.conv1.weight has NaN or infinity" in error
    assert not (tmp_path / "run").exists()
    error = told(capsys, "teacher.fit.lr=1e30")
    assert "teacher.fit.lr: got 1e+30; expected a lower rate: " in error
    assert not (tmp_path / "run" / "teacher.safetensors").exists(), "which a rerun would take for a teacher"


def test_no_cuda_where_it_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "device: got 'cuda'; expected cpu or auto" in told(capsys, "device=cuda")


def test_block_patterns_and_lists_that_name_nothing_or_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    assert "layer1.0" in told(capsys, "blocks.include=[layer1.00]")
    assert "blocks.exclude" in told(capsys, "blocks.exclude=[layer9*]")
    listed = told(capsys, "blocks.granularity=modules", "blocks.modules=[layer1.0,layer7]")
    assert "blocks.modules" in listed
    assert "layer7" in listed
    assert "layer1.0" in told(capsys, "blocks.granularity=modules", "blocks.modules=[layer1,layer1.0]")


def test_a_network_without_anything_to_replace(capsys: pytest.CaptureFixture[str]) -> None:
    error = told(
        capsys,
        "teacher=torchvision",
        "teacher.name=vit_b_16",
        "teacher.weights=null",
        "+teacher.options.image_size=32",
        "data.image_size=32",
    )
    assert "teacher.name: got 'vit_b_16'; expected a network with what student.recipe=separable replaces" in error


def test_a_teacher_whose_input_size_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    error = told(capsys, "teacher=cifar_vgg16_bn", "data.image_size=8")
    assert "data.image_size" in error


def test_what_cannot_be_carried_out_is_refused_before_anything_is_computed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    error = told(capsys, "blocks.granularity=modules", "blocks.modules=[layer1.0.conv1]", "plan.strategy=relay")
    assert "plan.strategy: got 'relay'" in error
    assert "this network is run through hooks" in error
    error = told(capsys, "plan.teacher_ranks=2")
    assert "plan.teacher_ranks: got 2; expected at most the number of ranks, 1" in error
    error = told(capsys, "teacher.cache=disk", "distill.views=2", "cache.max_gib=1e-6")
    assert "cache.max_gib: got 1e-06; expected at least 0.07, which 2 x 1294 images with 10 boundaries" in error
    error = told(capsys, "plan.memory_gib=0.01")
    assert re.search(r"plan.memory_gib: got 0.01; expected more than [\d.]+, which a rank has without any stu", error)
    assert list(tmp_path.iterdir()) == [], "told before the teacher is trained"


def test_a_plan_that_does_not_fit_says_what_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_memory, "used_memory", lambda _: 0)  # what the program has would make up for the students
    error = told(capsys, "stage=plan", "plan.cost=flops", "plan.memory_gib=0.004")
    found = re.fullmatch(
        r"distill: plan.memory_gib: got 0.004; expected at least ([\d.]+), which .* \(it may have 0.004 GiB\); or take "
        r"more ranks, smaller blocks or a smaller data.batch_size\n",
        error,
    )
    assert found, error
    close_logs()
    enough = str(1.1 * float(found[1]))
    assert run_rank([*SMALL, "run.dir=run", "stage=plan", "plan.cost=flops", f"plan.memory_gib={enough}"]) == 0


def test_a_link_between_hosts_where_there_is_one_host_is_said_to_change_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_rank([*SMALL, "run.dir=run", "stage=plan", "plan.cost=flops", "plan.link_gbit=0.1"]) == 0
    assert "plan: plan.link_gbit=0.1 changes nothing here: all ranks are on one host\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "said"), [("off", ["cache.dir=files", "cache.max_gib=2"]), ("ram", ["cache.dir=files"]), ("disk", [])]
)
def test_settings_of_a_cache_that_is_not_there_are_said_to_change_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str, said: list[str]
) -> None:
    said = [setting.replace("=files", f"={tmp_path}/files") for setting in said]
    given = ("cache.dir=files", "cache.max_gib=2", "distill.views=2", f"teacher.cache={place}")
    assert run_rank([*SMALL, "run.dir=run", "stage=teacher", *given]) == 0
    printed = capsys.readouterr().out.partition("teacher: training")[0]
    lines = [line for line in printed.splitlines() if "changes nothing" in line]
    assert lines == [f"cache: {setting} changes nothing here: teacher.cache={place}" for setting in said]


def test_a_run_directory_of_another_configuration_is_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quick = ("stage=plan", "plan.cost=flops")
    assert run_rank([*SMALL, "run.dir=run", *quick]) == 0
    close_logs()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    error = told(capsys, *quick, "finetune.lr=0.5")
    assert "run.dir" in error
    assert "finetune.lr=null there, 0.5 here" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_foreign_folder_is_not_taken_for_a_run_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("important")
    assert "run.dir" in told(capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_told_and_nothing_is_left_half_written(tmp_path: Path) -> None:
    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # less than the teacher's weights

    result = subprocess.run(
        [sys.executable, "-c", FROM_ARGUMENTS, *SMALL, "run.dir=run"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "cannot write" in result.stderr
    assert "free some space or set run.dir" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_an_error_of_ours_is_told_in_one_line_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("distill.job.rank.cut_blocks", fail)
    with pytest.raises(ZeroDivisionError):
        run_rank([*SMALL, "run.dir=run"])
    assert "distill: rank 0: ZeroDivisionError: division by zero\n" in capsys.readouterr().err


@pytest.mark.parametrize("run_dir", ["taken", "/proc/nowhere"])
def test_what_only_rank_0_meets_is_told_in_one_line_by_two_ranks(tmp_path: Path, run_dir: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("not a run")
    result = distill("stage=distill", "teacher.fit.epochs=1", f"run.dir={run_dir}", cwd=tmp_path, ranks=2)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("distill: run.dir: got ")
