"""Invariant 2: a block that finishes, or a rank that has nothing left, waits for no one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.dist import ranks
from tests.dist.ranks import Toy, connect, meet, run_ranks, run_toy, toy_rank

COLLECTIVES = ("barrier", "all_reduce", "all_gather", "broadcast", "reduce", "gather", "scatter", "monitored_barrier")


def test_a_block_that_stands_still_does_not_hold_the_others(tmp_path: Path) -> None:
    budgets = dict.fromkeys(range(4), 20)
    entries = run_toy(Toy(run_dir=str(tmp_path), owners=((0,), (1, 2), (3,)), budgets=budgets, hold_at=(3, 5)))
    assert [*entries][-1] == 3
    assert {entry.steps for entry in entries.values()} == {20}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_blocks_finish_in_every_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    budgets = {block: 2 + 3 * place for place, block in enumerate(order)}
    toy = Toy(run_dir=str(tmp_path), owners=((0,), (1, 2)), budgets=budgets)
    entries = run_toy(toy)
    assert {block: entry.steps for block, entry in entries.items()} == budgets
    report = json.loads((tmp_path / "report.json").read_text())
    assert sorted(report["recorded"]) == [0, 1, 2]


def test_a_finished_block_is_not_sent_anything_more(tmp_path: Path) -> None:
    budgets = {0: 3, 3: 6}
    run_toy(Toy(run_dir=str(tmp_path), owners=((), (0, 3)), budgets=budgets))
    report = json.loads((tmp_path / "report.json").read_text())
    pixels, batch, fp32 = 8 * 8, 16, 4
    first, last = (3 + 8) * pixels * batch * fp32, (12 + 8) * pixels * batch * fp32  # input and target of each block
    assert report["bytes_sent"] == 3 * first + 6 * last
    assert report["teacher_passes"] == 6


def without_collectives(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a collective in the distill stage")

    for name in COLLECTIVES:
        setattr(dist, name, forbidden)
        for group in (dist.ProcessGroupGloo, dist.ProcessGroup):
            if hasattr(group, name):
                setattr(group, name, forbidden)
    toy_rank(rank, world_size, environment, toy)


def test_a_relay_passes_nothing_more_on_for_blocks_that_have_stopped_early(tmp_path: Path) -> None:
    sent = []
    for name, nan_at in (("whole", None), ("stopped", (1, 3))):
        hold_at = (0, 10) if nan_at else None  # the first rank hears of the end long before its own
        budgets = {0: 60, 1: 60}
        toy = Toy(run_dir=str(tmp_path / name), owners=((0,), (1,)), budgets=budgets, strategy="relay",
                  hold_at=hold_at, nan_at=nan_at)  # fmt: skip
        assert run_toy(toy)[0].steps == 60
        sent.append(json.loads((tmp_path / name / "report.json").read_text())["bytes_sent"])
    assert sent[1] < 0.5 * sent[0]


def test_a_relay_goes_on_for_the_blocks_behind_where_those_before_them_have_finished(tmp_path: Path) -> None:
    budgets = {0: 2, 1: 4, 2: 7}
    entries = run_toy(Toy(run_dir=str(tmp_path), owners=((0,), (1,), (2,)), budgets=budgets, strategy="relay"))
    assert {block: entry.steps for block, entry in entries.items()} == budgets


def test_the_distill_stage_uses_no_collective(tmp_path: Path) -> None:
    toy = Toy(run_dir=str(tmp_path), owners=((0,), (1, 2), (3,)))
    run_ranks(without_collectives, 3, toy)
    assert (tmp_path / "report.json").exists()


def impatient(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    meet(connect(rank, world_size, environment))  # a process may take longer to start than that
    ranks.TIMEOUT_S = 4.0
    toy_rank(rank, world_size, environment, toy)


def test_a_rank_that_feeds_itself_may_train_on_for_longer_than_a_peer_may_be_silent(tmp_path: Path) -> None:
    toy = Toy(run_dir=str(tmp_path), owners=((0,), (1,)), budgets={0: 1, 1: 60}, strategy="replicate", slow={1: 0.1})
    run_ranks(impatient, 2, toy)
    assert json.loads((tmp_path / "report.json").read_text())["makespan_s"] > 6.0


def test_spare_ranks_without_blocks_leave_the_others_alone(tmp_path: Path) -> None:
    entries = run_toy(Toy(run_dir=str(tmp_path), owners=((0,), (1,), (), ()), budgets={0: 3, 1: 3}))
    assert sorted(entries) == [0, 1]
