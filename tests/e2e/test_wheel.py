"""The wheel, installed into an environment of its own and used from another folder: it needs nothing of a checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.e2e.command import environment

pytestmark = pytest.mark.index  # the build fetches its backend

ROOT = Path(__file__).resolve().parents[2]


def output(*command: str | Path, cwd: Path) -> str:
    alone = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=alone, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    output(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of an environment that has the wheel, and of this one the other packages."""
    home = wheel.parent / "environment"
    output(sys.executable, "-m", "venv", "--without-pip", home, cwd=wheel.parent)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python")
    output(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(
        sysconfig.get_path("purelib")
    )  # its own .pth files, the checkout, not followed
    return home / "bin"


def test_the_wheel_holds_its_licences_and_its_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(path).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "distill/data/digits.LICENSE"]
    assert {"distill/py.typed", "distill/data/digits.npz"} <= set(names)


def test_the_command_finds_configuration_data_and_batch_scripts(installed: Path, tmp_path: Path) -> None:
    small = ("data.image_size=8", "teacher.fit.epochs=1", "plan.cost=flops", "launch.threads_per_rank=1")
    assert "plan: predicted peak memory" in output(installed / "distill", "stage=plan", *small, cwd=tmp_path)
    scripts = Path(output(installed / "python", "-m", "distill", "slurm", cwd=tmp_path).strip())
    assert scripts.is_relative_to(installed.parent)
    assert sorted(file.name for file in scripts.iterdir()) == ["distill.sbatch", "sweep.sbatch"]
    imagined = ("simulate", "cluster=dgx_a100", "data.image_size=8", "distill.steps=4", "teacher.fit.epochs=1")
    assert "ranks" in output(installed / "distill", *imagined, cwd=tmp_path)


def test_a_user_s_program_is_typed(installed: Path, tmp_path: Path) -> None:
    program = tmp_path / "user_program.py"
    program.write_text((ROOT / "tests" / "user_program.py").read_text())
    options = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    mypy = (sys.executable, "-m", "mypy", "--python-executable", installed / "python", *options)
    assert "no issues found in 1 source file" in output(*mypy, program, cwd=tmp_path)
