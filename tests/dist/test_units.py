"""Several candidates of a block and students of several blocks, on real ranks: each with the bits that it has alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing import ProcessRaisedException

from distill.planning.schedule import Checks
from distill.planning.unit import Unit
from distill.storage.ledger import Entry
from tests.dist.ranks import Toy, run_toy

# Block 1 has three candidates (1, 4, 5), and one stands for blocks 1 and 2 together (6).
UNITS = (Unit(4, "second", 1, 2, "second"), Unit(5, "third", 1, 2, "third"), Unit(6, "both", 1, 3, "both"))
BUDGETS = dict.fromkeys(range(7), 6)
ALONE = ((0, 1, 2, 3, 4, 5, 6),)


def toy(folder: Path, owners: tuple[tuple[int, ...], ...], **changes: Any) -> Toy:
    return Toy(run_dir=str(folder), owners=owners, **{"budgets": BUDGETS, "units": UNITS} | changes)


def bits(entries: dict[int, Entry]) -> dict[int, str]:
    return {number: entry.sha256 for number, entry in entries.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    found = run_toy(toy(tmp_path_factory.mktemp("alone"), ALONE))
    assert {number: entry.block for number, entry in found.items()} == {0: 0, 1: 1, 2: 2, 3: 3, 4: 1, 5: 1, 6: 1}
    assert len(set(bits(found).values())) == 7
    return bits(found)


@pytest.mark.parametrize(
    ("owners", "changes"),
    [
        (((0, 4, 3), (1, 2, 5, 6)), {}),
        (((4,), (1, 3), (5, 0), (2, 6)), {}),
        (((0, 4, 3), (1, 2, 5, 6)), {"teacher_ranks": 2}),
        (((0, 4), (1, 2, 5, 6, 3)), {"strategy": "replicate"}),
        (((0, 4), (1, 2, 5, 6, 3)), {"strategy": "layerwise"}),
        (((0,), (1, 4, 5, 2, 6), (3,)), {"strategy": "relay"}),
        (((0, 4), (1, 2, 5, 6, 3)), {"strategy": "cached", "views": 1}),
    ],
    ids=str,
)
def test_every_unit_has_the_bits_of_one_rank_whatever_the_layout(
    tmp_path: Path, alone: dict[int, str], owners: tuple[tuple[int, ...], ...], changes: dict[str, Any]
) -> None:
    wanted = alone
    if changes.get("strategy") == "cached":  # whose activations come from other batches
        (tmp_path / "alone").mkdir()
        wanted = bits(run_toy(toy(tmp_path / "alone", ALONE, **changes)))
    (tmp_path / "run").mkdir()
    assert bits(run_toy(toy(tmp_path / "run", owners, **changes))) == wanted


def test_a_crash_and_a_restart_on_another_layout_leave_no_trace(tmp_path: Path, alone: dict[int, str]) -> None:
    with pytest.raises(ProcessRaisedException, match="injected on rank 1 at step 5"):
        run_toy(toy(tmp_path, ((0, 4, 3), (1, 2, 5, 6)), checkpoint_every=2, fail_at=(1, 5)))
    again = run_toy(toy(tmp_path, ((6, 1), (5,), (0, 2, 3, 4)), generation=2, checkpoint_every=2))
    assert bits(again) == alone


def test_a_rank_is_sent_a_boundary_once_however_many_of_its_units_want_it(tmp_path: Path) -> None:
    def sent(*theirs: int) -> int:
        numbers = (0, *theirs)
        folder = tmp_path / "-".join(map(str, numbers))
        run_toy(toy(folder, ((0,), theirs), budgets=dict.fromkeys(numbers, 6)))
        return int(json.loads((folder / "report.json").read_text())["bytes_sent"])

    assert sent(1) == sent(1, 4, 5) > 0
    assert sent(1, 4, 6) == sent(1, 2), "the one that spans two blocks adds the second block's end, not their seam"


def test_units_look_at_held_out_batches_and_change_ranks_like_blocks(tmp_path: Path, alone: dict[int, str]) -> None:
    """The rank with one unit soon runs dry and takes over one of the slow candidates."""
    looks = {"checks": Checks(every=4, batches=1)}
    owners = ((0, 2), (1, 4, 5, 6), (3,))
    budgets = BUDGETS | dict.fromkeys((1, 4, 5, 6), 80)
    slow = dict.fromkeys((1, 4, 5, 6), 0.03)
    still = run_toy(toy(tmp_path / "still", owners, budgets=budgets, take_over=False, **looks))
    moved = run_toy(toy(tmp_path / "moved", owners, budgets=budgets, slow=slow, **looks))
    assert bits(moved) == bits(still)
    assert all(entry.rel_error_held_out is not None for entry in moved.values())
    moves = json.loads((tmp_path / "moved" / "report.json").read_text())["moves"]
    assert {move["unit"] for move in moves} <= {1, 4, 5, 6}
    assert moves
