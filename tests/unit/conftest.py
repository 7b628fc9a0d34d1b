"""What unit tests put in the machine's place: NVML and a powercap tree (see tests/metered.py), and its free
memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill.machine import host
from tests.nvml import FakeNvml


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return FakeNvml().install(monkeypatch)


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    return tmp_path / "powercap"


@pytest.fixture
def available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the bytes that the host has available, nearly all of which hold files that Linux can let go of."""

    def set_to(size: int) -> None:
        facts = tmp_path / "meminfo"
        facts.write_text(f"MemTotal: 16000000 kB\nMemFree: 10 kB\nMemAvailable:  {size // 1024} kB\n")
        monkeypatch.setattr(host, "MEMORY", facts)

    return set_to


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    return tmp_path / "run"
