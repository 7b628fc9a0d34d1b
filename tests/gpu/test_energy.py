"""The real NVML: a GPU's counter advances under load, and a job on it reports joules."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from distill.observability.energy.counters import bare_uuid, open_counters
from tests.e2e.command import distill, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

UPDATES_S = 0.5  # the driver renews the counter every 20 to 100 ms


def test_the_devices_joules_grow_under_load() -> None:
    uuid = bare_uuid(str(torch.cuda.get_device_properties(0).uuid))
    matrix = torch.randn(4096, 4096, device="cuda")
    with open_counters() as counters:
        device = next((counter for counter in counters.found if counter.uuid == uuid), None)
        if device is None:
            pytest.skip(f"NVML does not list this board: {counters.missing}")
        spent = []
        for load in (False, True):
            before, until = device.read(), time.monotonic() + 4 * UPDATES_S
            while time.monotonic() < until:
                if load:
                    matrix @ matrix
                    torch.cuda.synchronize()
                else:
                    time.sleep(0.01)
            spent.append(device.joules(before, device.read()))
    assert spent[0] > 0
    assert spent[1] > spent[0]


def test_a_job_on_the_device_reports_the_joules_of_its_ranks(tmp_path: Path) -> None:
    result = distill("device=cuda", "run.dir=run", "distill.steps=200", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    energy = metrics(tmp_path / "run")["energy"]
    if not any(device["ranks"] == [0] for device in energy["devices"] if device["kind"] == "gpu"):
        pytest.skip(f"the board is not readable: {energy['not_measured']}")
    stage = energy["stages"]["distill"]
    assert stage["gpu_joules"] > 0
    assert stage["ranks"] == {"0": stage["gpu_joules"]}
    assert energy["joules_per_image"]["distill"] > 0
