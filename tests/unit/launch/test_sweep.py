"""Which jobs a sweep has: their overrides, their tags, its key, and what `distill jobs` prints."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config.compose import compose
from distill.config.fingerprint import identity, run_directory
from distill.errors import ConfigError
from distill.launch.sweep import LONGEST_TAG, list_jobs, read_sweep


def directory(overrides: list[str]) -> Path:
    config = compose(overrides)
    return run_directory(config, identity(config))


def test_jobs_are_the_product_in_hydras_order() -> None:
    jobs = read_sweep(["student.rank=1,2", "finetune.lr=choice(0.1,0.2)", "seed=range(3,5)"]).jobs
    assert len(jobs) == 8
    assert jobs[0] == ["student.rank=1", "finetune.lr=0.1", "seed=3"]
    assert jobs[1] == ["student.rank=1", "finetune.lr=0.1", "seed=4"]
    assert jobs[-1] == ["student.rank=2", "finetune.lr=0.2", "seed=4"]


def test_swept_settings_that_do_not_change_what_is_computed_keep_run_directories_apart() -> None:
    jobs = read_sweep(["seed=1,2", "plan.window=2,4", "launch.nproc_per_node=1"]).jobs
    assert [job[-1] for job in jobs] == ["run.tag=plan.window-2", "run.tag=plan.window-4"] * 2
    folders = {directory(job).name for job in jobs}
    assert len(folders) == 4
    assert {folder.split("-", 1)[1] for folder in folders} == {"plan.window-2", "plan.window-4"}


def test_a_sweep_over_what_is_computed_finds_the_run_directories_of_plain_runs() -> None:
    jobs = read_sweep(["seed=1,2", "plan.window=3"]).jobs
    assert jobs == [["seed=1", "plan.window=3"], ["seed=2", "plan.window=3"]]
    assert directory(jobs[0]) == directory(["seed=1"])


@pytest.mark.parametrize("own", ["run.tag=mine", "run.dir=here"])
def test_a_given_run_directory_or_tag_stays(own: str) -> None:
    assert read_sweep(["plan.window=2,4", own]).jobs[0] == ["plan.window=2", own]


def test_a_tag_of_paths_is_a_folder_name_of_bounded_length() -> None:
    tag = read_sweep([f"cache.dir=/{'long/' * 60}a,/b"]).jobs[0][-1].partition("=")[2]
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
        (["seed=[1,2"], r"seed: got '\[1,2'; expected an integer"),
        (["seed=1,2", "hydra/launcher=nowhere"], "hydra/launcher: got 'nowhere'; expected one of basic"),
        (["seed=1,2", "hydra.launcher.nodes=2"], "hydra.launcher.nodes.*hydra/launcher=choice"),
    ],
)
def test_a_mistake_in_what_all_jobs_share_names_the_setting(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sweep(arguments)


def test_without_the_extra_slurm_its_launcher_says_what_to_install() -> None:
    program = (
        "import hydra_plugins, sys; hydra_plugins.__path__ = []; from distill.launch.multirun import multirun;"
        "sys.exit(multirun(['-m', 'seed=1,2', 'hydra/launcher=submitit_slurm', 'hydra.launcher.nodes=1']))"
    )
    pytest.importorskip("hydra_plugins")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hydra/launcher: got 'submitit_slurm'" in done.stderr
    assert "pip install -e '.[slurm]'" in done.stderr


def test_on_slurm_counts_and_addresses_come_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    assert compose(["launch=slurm"]).launch.nnodes == 1, "elsewhere it is one node"
    given = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "4",
             "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURMD_NODENAME": "node8"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    first = compose(["launch=slurm"]).launch
    assert (first.nnodes, first.nproc_per_node, first.rdzv_id, first.local_addr) == (2, 4, "77-0", "node8")
    assert first.rdzv_here is False
    assert (first.rdzv_endpoint or "").startswith("10.0.0.1:")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = compose(["launch=slurm"]).launch
    assert again.rdzv_id == "77-1"
    assert again.rdzv_endpoint != first.rdzv_endpoint, "what is left of the first attempt is not met"


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
    program = (
        "import sys; from distill.launch import sweep; sys.stderr.write(str('torch' in sys.modules)); sys.exit({})"
    )
    call = program.format("sweep.list_jobs(['seed=1,2'])")
    done = subprocess.run([sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("seed=1\nseed=2\n", "False")
    assert list(tmp_path.iterdir()) == []
