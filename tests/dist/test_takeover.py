"""A rank that runs dry takes a block over from the busiest rank: same bits, and nobody else waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.ledger import Entry
from tests.dist.ranks import Toy, run_toy

SLOW = dict.fromkeys(range(4), 0.01)  # seconds a step, so that there is something to gain


def bits(entries: dict[int, Entry]) -> dict[int, str]:
    return {block: entry.sha256 for block, entry in entries.items()}


def moves(run_dir: Path) -> list[dict[str, int]]:
    return list(json.loads((run_dir / "report.json").read_text())["moves"])


LAYOUTS = {
    "from rank 0": (((0, 1, 2), (3,)), {0: 150, 1: 150, 2: 150, 3: 10}),
    "to rank 0": (((3,), (0, 1, 2)), {0: 150, 1: 150, 2: 150, 3: 10}),
    "between others": (((), (0, 1, 2), (3,)), {0: 150, 1: 150, 2: 150, 3: 10}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_goes_to_the_rank_that_has_run_dry_and_keeps_its_bits(tmp_path: Path, layout: str) -> None:
    owners, budgets = LAYOUTS[layout]
    rest: dict[str, Any] = {"budgets": budgets, "slow": SLOW}
    alone = run_toy(Toy(run_dir=str(tmp_path / "alone"), owners=((0, 1, 2, 3),), budgets=budgets))
    entries = run_toy(Toy(run_dir=str(tmp_path / "moved"), owners=owners, **rest))
    assert bits(entries) == bits(alone)
    found = moves(tmp_path / "moved")
    print(found, json.loads((tmp_path / "moved" / "report.json").read_text()))
    assert found
