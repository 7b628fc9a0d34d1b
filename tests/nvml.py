"""A stand-in for NVML at the library's boundary: pynvml's functions replaced, its real error classes raised."""

from __future__ import annotations

from dataclasses import dataclass, field

import pynvml
import pytest


@dataclass
class Board:
    """One GPU. Every reading finds `pace` millijoules more. `error` is the NVML code that reading its counter ends in,
    `broken` that of asking for its handle."""

    uuid: str
    millijoules: int = 1_000_000
    error: int | None = None
    broken: int | None = None
    mig: bool = False
    knows_mig: bool = True
    reads: int = 0
    pace: int = 0


@dataclass
class FakeNvml:
    """The driver: its boards, whether it starts, and whether it has been shut down again."""

    boards: list[Board] = field(default_factory=list)
    refuses: int | None = None
    running: bool = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
        for name in ("Init", "Shutdown"):
            monkeypatch.setattr(pynvml, f"nvml{name}", getattr(self, name.lower()))
        for name in ("Count", "HandleByIndex", "Name", "UUID", "MigMode", "TotalEnergyConsumption"):
            monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", getattr(self, f"get_{name.lower()}"))
        return self

    def init(self) -> None:
        if self.refuses is not None:
            raise pynvml.NVMLError(self.refuses)
        self.running = True

    def shutdown(self) -> None:
        self._check()
        self.running = False

    def get_count(self) -> int:
        self._check()
        return len(self.boards)

    def get_handlebyindex(self, index: int) -> Board:
        self._check(self.boards[index].broken)
        return self.boards[index]

    def get_name(self, board: Board) -> str:
        self._check()
        return "NVIDIA Fake"

    def get_uuid(self, board: Board) -> str:
        self._check()
        return f"GPU-{board.uuid}"

    def get_migmode(self, board: Board) -> list[int]:
        self._check(None if board.knows_mig else pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(board.mig), int(board.mig)]

    def get_totalenergyconsumption(self, board: Board) -> int:
        self._check(board.error)
        board.reads += 1
        board.millijoules += board.pace
        return board.millijoules

    def _check(self, code: int | None = None) -> None:
        if not self.running:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if code is not None:
            raise pynvml.NVMLError(code)
