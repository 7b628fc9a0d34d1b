"""One finished small run that several files of tests look at; none of them changes it."""

from pathlib import Path

import pytest

from tests.e2e.command import FINISHED, distill


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run on two ranks in the default run directory, and what it printed."""
    cwd = tmp_path_factory.mktemp("finished")
    result = distill("deploy.programs=[pt2,onnx,int8]", *FINISHED, cwd=cwd, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    found = list((cwd / "outputs").glob("*/*"))
    assert len(found) == 1, "all ranks of a run share one run directory"
    return found[0], result.stdout
