"""The link probe between two real ranks: it sees a slow link, and nothing of it stays behind."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from distill.distributed.edges.probe import ROW_BYTES, ROWS, probe_from, probe_to
from distill.distributed.edges.shared_ring import SharedRing
from distill.distributed.edges.wire import Wire
from distill.distributed.transport import Edge
from tests.dist.ranks import connect, run_ranks

DELAY_S = 0.05


def probe(
    rank: int, world_size: int, environment: Mapping[str, str], out: str, shared_memory: bool, slow: bool
) -> None:
    store = connect(rank, world_size, environment).address.connect()
    edge = Edge(0, 1, 1, 20.0, name="probe")
    wire = Wire(device=torch.device("cpu"), backend="gloo", shared_memory=shared_memory)
    if slow:
        fill = SharedRing.fill
        SharedRing.fill = lambda *arguments: (time.sleep(DELAY_S), fill(*arguments))  # type: ignore[assignment]
    found = {"price": probe_from(edge, store, wire)} if rank == 0 else asdict(probe_to(edge, store, wire))
    Path(f"{out}{rank}").write_text(json.dumps(found))


def found_by(out: Path) -> dict[str, float]:
    """What both ends have found."""
    return {key: value for rank in range(2) for key, value in json.loads(Path(f"{out}{rank}").read_text()).items()}


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_link_has_a_bandwidth_and_a_latency(tmp_path: Path, shared_memory: bool) -> None:
    out = tmp_path / "found.json"
    run_ranks(probe, 2, str(out), shared_memory, False)
    found = found_by(out)
    assert 0 < found["price"] < 1e-6
    assert found["bytes_per_s"] < 3 / found["price"], "faster than its sender can copy"
    assert 0 < found["latency_s"] < ROW_BYTES * ROWS[-1] / found["bytes_per_s"] + 1.0
    assert found["bytes_per_s"] > 1e7


def test_a_slow_link_is_seen_with_batches_that_are_not_too_large_for_it(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    run_ranks(probe, 2, str(out), True, True)
    found = found_by(out)
    assert found["latency_s"] > 0.9 * DELAY_S
    assert found["bytes_per_s"] < 1.2 * ROW_BYTES * ROWS[1] / DELAY_S
