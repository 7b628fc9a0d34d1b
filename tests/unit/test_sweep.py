"""Which jobs a sweep has: their overrides, their tags, its key, and what `distill jobs` prints."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distill.compose import compose
from distill.config import run_directory
from distill.errors import ConfigError
from distill.sweep import LONGEST_TAG, list_jobs, read_sweep


def test_jobs_are_the_product_in_hydras_order() -> None:
    jobs = read_sweep(["student.rank=1,2", "finetune.lr=choice(0.1,0.2)", "seed=range(3,5)"]).jobs
    assert len(jobs) == 8
    assert jobs[0] == ["student.rank=1", "finetune.lr=0.1", "seed=3"]
    assert jobs[1] == ["student.rank=1", "finetune.lr=0.1", "seed=4"]
    assert jobs[-1] == ["student.rank=2", "finetune.lr=0.2", "seed=4"]


def test_swept_settings_that_do_not_change_what_is_computed_keep_run_directories_apart() -> None:
    jobs = read_sweep(["seed=1,2", "plan.window=2,4", "launch.nproc_per_node=1"]).jobs
    assert [job[-1] for job in jobs] == ["run.tag=plan.window-2", "run.tag=plan.window-4"] * 2
    folders = {run_directory(compose(job)).name for job in jobs}
    assert len(folders) == 4
    assert {folder.split("-", 1)[1] for folder in folders} == {"plan.window-2", "plan.window-4"}


def test_a_sweep_over_what_is_computed_finds_the_run_directories_of_plain_runs() -> None:
    jobs = read_sweep(["seed=1,2", "plan.window=3"]).jobs
    assert jobs == [["seed=1", "plan.window=3"], ["seed=2", "plan.window=3"]]
    assert run_directory(compose(jobs[0])) == run_directory(compose(["seed=1"]))


@pytest.mark.parametrize("own", ["run.tag=mine", "run.dir=here"])
def test_a_given_run_directory_or_tag_stays(own: str) -> None:
    assert read_sweep(["plan.window=2,4", own]).jobs[0] == ["plan.window=2", own]


def test_a_tag_of_paths_is_a_folder_name_of_bounded_length() -> None:
    tag = read_sweep([f"data.root=/{'long/' * 60}a,/b"]).jobs[0][-1].partition("=")[2]
    assert len(tag) <= LONGEST_TAG
    compose([f"run.tag={tag}"])
    with pytest.raises(ConfigError, match=r"run\.tag.*letters, digits"):
        compose(["run.tag=a/b"])


def test_how_jobs_are_launched_is_not_part_of_them() -> None:
    local = read_sweep(["seed=1,2"])
    elsewhere = read_sweep(["seed=1,2", "hydra/launcher=basic", "hydra.verbose=false"])
    assert elsewhere.jobs == local.jobs
    assert elsewhere.key == local.key
    assert read_sweep(["seed=1,3"]).key != local.key
    with pytest.raises(ConfigError, match=r"hydra\.verbose"):
        read_sweep(["hydra.verbose=true,false"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=1,2", "plan.windw=3"], "plan.windw.*'plan.window'"),
        (["seed=1,2", "teacher=resnet5"], "teacher.*'resnet50'"),
        (["seed=[1,2"], "command line"),
    ],
)
def test_a_mistake_in_what_all_jobs_share_names_the_setting(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sweep(arguments)


def test_listed_jobs_can_be_read_back_by_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["seed=1,2", "teacher.weights='/a b/c.pt'", "blocks.include=[layer1*,conv1]"]
    assert list_jobs(overrides) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line) for line in lines] == read_sweep(overrides).jobs
    assert compose(shlex.split(lines[1])).teacher.weights == "/a b/c.pt"
    assert list_jobs([*overrides, "--job", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[1:]


@pytest.mark.parametrize("job", [-1, 3])
def test_a_job_that_the_sweep_does_not_have_names_the_array(job: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_jobs(["seed=1,2,3", f"--job={job}"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "this sweep has 3 jobs: --array=0-2" in shown.err


def test_the_command_lists_jobs_without_torch(tmp_path: Path) -> None:
    program = "import sys, distill.sweep; sys.stderr.write(str('torch' in sys.modules)); sys.exit(distill.sweep.{})"
    call = program.format("list_jobs(['seed=1,2'])")
    done = subprocess.run([sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("seed=1\nseed=2\n", "False")
    assert list(tmp_path.iterdir()) == []
