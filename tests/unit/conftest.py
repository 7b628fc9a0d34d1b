"""A fake NVML and a fake powercap tree for the tests of counters, meters and energy; see tests/metered.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nvml import FakeNvml


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return FakeNvml().install(monkeypatch)


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    return tmp_path / "powercap"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    return tmp_path / "run"
