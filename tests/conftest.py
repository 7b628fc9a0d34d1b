"""How tests are shared out where several processes run them: by file, because a file's tests share what they start."""

import os
from pathlib import Path

import pytest

from distill.__main__ import RESOLVER

os.environ.setdefault("RES_OPTIONS", RESOLVER)  # stores of the tests are served by their own process

TOGETHER = {"slurm"}  # folders that share one thing which exists once: the cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = Path(str(item.path))
        folder = file.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in TOGETHER else f"{folder}/{file.name}"))
    items.sort(key=lambda item: Path(str(item.path)).parent.name not in TOGETHER)  # the longest first
