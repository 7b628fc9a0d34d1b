"""Ranks that are metered: one reader a host, and other hosts follow rank 0's stages."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from distill.distributed.roll_call import call_roll
from distill.job.energy import metering
from distill.machine import host
from distill.observability.energy.joules import summarize
from tests.dist.ranks import TIMEOUT_S, connect, run_ranks
from tests.nvml import Board, FakeNvml


def rank(rank: int, world_size: int, environment: Mapping[str, str], run_dir: str, hosts: tuple[str, ...]) -> None:
    """One rank of a job of two stages on `hosts[rank]`, each host with one GPU whose counter advances by 1 J
    a reading."""
    with pytest.MonkeyPatch.context() as patch:
        FakeNvml([Board(hosts[rank], pace=1_000)]).install(patch)
        patch.setattr(socket, "gethostname", lambda: hosts[rank])
        patch.setattr(host, "BOOT_ID", Path(run_dir) / "none")
        control = connect(rank, world_size, environment)
        with metering(control, Path(run_dir), call_roll(control, torch.device("cpu"))) as watchers:
            assert len(watchers) == (1 if rank == 0 else 0)
            for stage in ("teacher", "distill"):
                if rank == 0:
                    with watchers[0](stage):
                        _until_all_know(Path(run_dir), set(hosts), stage)
                    control.set(f"over/{stage}", True)
                else:
                    control.wait(f"over/{stage}", peer=0, purpose="end of the stage")
        control.leave()


def _until_all_know(run_dir: Path, hosts: set[str], stage: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        files = [run_dir / "metrics" / f"energy-{host}.jsonl" for host in hosts]
        begun = [
            record.get("stage") == stage
            for file in files
            if file.exists()
            for record in map(json.loads, file.read_text().splitlines()[-1:])
        ]
        if sum(begun) == len(hosts):
            return
        assert time.monotonic() < deadline, f"not every host has begun {stage}"
        time.sleep(0.05)


def test_every_host_is_read_once_and_counts_for_rank_0s_stages(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    run_ranks(rank, 3, str(tmp_path), ("a", "b", "b"))
    assert sorted(file.name for file in (tmp_path / "metrics").iterdir()) == ["energy-a.jsonl", "energy-b.jsonl"]
    found = summarize(tmp_path)
    assert [*found["stages"]] == ["teacher", "distill"]
    assert [device["host"] for device in found["devices"]] == ["a", "b"]
    assert [device["joules"] for device in found["devices"]] == [{"teacher": 1.0, "distill": 1.0}] * 2
    assert all(stage["gpu_joules"] is None for stage in found["stages"].values()), "the ranks compute on the CPU"
    assert [stage["idle_devices_joules"] for stage in found["stages"].values()] == [2.0, 2.0]
