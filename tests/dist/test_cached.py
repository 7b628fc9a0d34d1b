"""Cached targets: the teacher runs once over all fixed views, and the students do not depend on who recorded what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from distill.planning.schedule import Checks
from tests.dist.ranks import Toy, run_toy
from tests.dist.test_same_bits import ALONE, bits

BUDGETS = dict.fromkeys(range(4), 9)
PASSES = 2 * 81  # two views of 1,294 training images in batches of 16


def cached(run_dir: Path, owners: tuple[tuple[int, ...], ...] = ALONE, **changes: Any) -> Toy:
    run_dir.mkdir(exist_ok=True)
    return Toy(
        **({"run_dir": str(run_dir), "owners": owners, "strategy": "cached", "views": 2, "budgets": BUDGETS} | changes)
    )


def passes(run_dir: Path, generation: int = 1) -> list[int]:
    """How many batches each rank has recorded."""
    return [int(file.read_text()) for file in sorted(run_dir.glob(f"passes.*.{generation}"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    run_dir = tmp_path_factory.mktemp("alone")
    found = bits(run_toy(cached(run_dir)))
    assert len(set(found.values())) == 4
    assert passes(run_dir) == [PASSES]
    return found


@pytest.mark.parametrize("owners", [((0, 3), (1, 2)), ((), (0, 1, 2, 3)), ((1,), (3, 0), (2,))])
@pytest.mark.parametrize("on_disk", [False, True])
def test_any_placement_and_place_gives_the_bits_of_one_rank(
    tmp_path: Path, alone: dict[int, str], owners: tuple[tuple[int, ...], ...], on_disk: bool
) -> None:
    late = len(owners) - 1  # the others must not begin before its share is there
    place = str(tmp_path / "cache") if on_disk else None
    toy = cached(tmp_path / "run", owners, cache_dir=place, slow_recorder=late)
    assert bits(run_toy(toy)) == alone
    shares = passes(tmp_path / "run")
    assert sum(shares) == PASSES
    assert max(shares) - min(shares) <= 1, "also a rank without blocks records its share"


def test_a_crash_and_a_restart_on_another_layout_leave_no_trace_and_use_the_file_again(
    tmp_path: Path, alone: dict[int, str]
) -> None:
    changes = {"checkpoint_every": 2, "cache_dir": str(tmp_path / "cache")}
    run_dir = tmp_path / "run"
    with pytest.raises(ProcessRaisedException, match="injected on rank 1 at step 5"):
        run_toy(cached(run_dir, ((0, 1), (2, 3)), fail_at=(1, 5), **changes))
    assert sum(passes(run_dir)) == PASSES
    assert bits(run_toy(cached(run_dir, ((3,), (0,), (1, 2)), generation=2, **changes))) == alone
    assert passes(run_dir, generation=2) == [0, 0, 0]


def test_a_crash_while_recording_in_memory_leaves_no_trace(tmp_path: Path, alone: dict[int, str]) -> None:
    with pytest.raises(ProcessRaisedException, match="injected while recording"):
        run_toy(cached(tmp_path / "run", ((0, 1), (2, 3)), record_fails=(1, 7)))
    assert bits(run_toy(cached(tmp_path / "run", ((0, 1), (2, 3)), generation=2))) == alone


def test_a_half_recorded_file_is_recorded_again(tmp_path: Path, alone: dict[int, str]) -> None:
    folder = tmp_path / "cache"
    changes = {"cache_dir": str(folder)}
    with pytest.raises(ProcessRaisedException, match="injected while recording"):
        run_toy(cached(tmp_path / "run", ((0, 1), (2, 3)), record_fails=(1, 30), **changes))
    assert [file.name for file in folder.iterdir()] == ["toy.test.unfinished"]
    assert bits(run_toy(cached(tmp_path / "run", ((0, 1), (2, 3)), generation=2, **changes))) == alone
    assert sorted(file.name for file in folder.iterdir()) == ["toy.json", "toy.rows"]
    assert sum(passes(tmp_path / "run", generation=2)) == PASSES


def test_a_cached_run_trains_on_the_images_of_a_run_without_a_cache(tmp_path: Path) -> None:
    checks = Checks(every=4, batches=2)
    with_cache = run_toy(cached(tmp_path / "a", cache_dir=str(tmp_path / "cache"), checks=checks))
    without = run_toy(cached(tmp_path / "b", strategy="broadcast", checks=checks))
    fresh = run_toy(cached(tmp_path / "c", strategy="broadcast", views=None))
    for block in BUDGETS:
        assert with_cache[block].rel_error_last == pytest.approx(without[block].rel_error_last, rel=1e-4)
        assert with_cache[block].rel_error_held_out == pytest.approx(without[block].rel_error_held_out, rel=1e-4)
        assert with_cache[block].rel_error_last != pytest.approx(fresh[block].rel_error_last, rel=1e-4)


def test_the_plateau_rule_stops_blocks_at_the_same_step_on_any_layout(tmp_path: Path, alone: dict[int, str]) -> None:
    rule = {"checks": Checks(every=2, batches=2), "patience": 1, "budgets": dict.fromkeys(range(4), 40)}
    here = run_toy(cached(tmp_path / "a", **rule))
    there = run_toy(cached(tmp_path / "b", ((2,), (0, 1, 3)), cache_dir=str(tmp_path / "cache"), **rule))
    assert bits(here) == bits(there)
    assert any(entry.steps < 40 for entry in here.values()), "the rule stopped nobody: the test shows nothing"
    assert all(entry.rel_error_held_out is not None for entry in here.values())
    assert passes(tmp_path / "a") == [PASSES + 2]


def test_bf16_rounds_for_every_rank_alike(tmp_path: Path, alone: dict[int, str]) -> None:
    here = bits(run_toy(cached(tmp_path / "a", wire_dtype=torch.bfloat16)))
    there = bits(run_toy(cached(tmp_path / "b", ((0,), (1, 2, 3)), wire_dtype=torch.bfloat16)))
    assert here == there
    assert not set(here.values()) & set(alone.values())
