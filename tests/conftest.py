"""How tests are shared out where several processes run them, by file, because a file's tests share what they start; and
what they need, by the fixtures that they use."""

import os
from pathlib import Path

import pytest

from distill.__main__ import RESOLVER

os.environ.setdefault("RES_OPTIONS", RESOLVER)  # stores of the tests are served by their own process
# Tensors of tests are small. Two threads of each of two processes on two cores wait by spinning, three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TOGETHER = {"slurm"}  # folders that share one thing which exists once: the cluster
NEEDS = {"slurm", "browser"}  # fixtures whose tests are marked by their names


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = Path(str(item.path))
        folder = file.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in TOGETHER else f"{folder}/{file.name}"))
        for need in NEEDS & set(getattr(item, "fixturenames", ())):
            item.add_marker(need)
    items.sort(key=lambda item: Path(str(item.path)).parent.name not in TOGETHER)  # the longest first
