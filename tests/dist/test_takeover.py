"""A rank that runs dry takes a block over from the busiest rank: same bits, and nobody else waits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from distill.blocks.chain import Chain
from distill.distributed.transport import PairGroup
from distill.engine.completion import Collector
from distill.engine.rebalance import handover
from distill.errors import DistillError
from distill.planning.memory_model import Memory
from distill.planning.schedule import Checks
from distill.storage.ledger import Entry, Ledger
from tests.dist import ranks
from tests.dist.ranks import Toy, run_ranks, run_toy, toy_rank
from tests.matrix import matrix

ALONE = ((0, 1, 2, 3),)
BUDGETS = {0: 80, 1: 80, 2: 80, 3: 5}  # block 3 ends early, and its rank runs dry
SLOW = {0: 0.03, 1: 0.01, 2: 0.01, 3: 0.01}  # seconds a step: half of what its rank has is in block 0, so it moves
SELF_FED = {  # name: strategy, owners, budgets
    "relay, to the rank behind": ("relay", ((0, 1, 2), (3,)), BUDGETS),
    "relay, to the rank that passes their batches on": ("relay", ((0,), (1, 2, 3)), {0: 5, 1: 80, 2: 80, 3: 80}),
    "replicate": ("replicate", ((0, 1, 2), (3,)), BUDGETS),
    "replicate, to a rank without blocks": ("replicate", ((0, 1, 2, 3), ()), BUDGETS),
}
LAYOUTS = {
    "from rank 0": ((0, 1, 2), (3,)),
    "to rank 0": ((3,), (0, 1, 2)),
    "between others": ((), (0, 1, 2), (3,)),
}


def bits(entries: Mapping[int, Entry]) -> dict[int, str]:
    return {block: entry.sha256 for block, entry in entries.items()}


def moves(run_dir: Path) -> list[dict[str, int]]:
    return list(json.loads((run_dir / "report.json").read_text())["moves"])


def toy(run_dir: Path, owners: tuple[tuple[int, ...], ...], **settings: Any) -> Toy:
    return Toy(**{"run_dir": str(run_dir), "owners": owners, "budgets": BUDGETS, "slow": SLOW} | settings)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return bits(run_toy(toy(tmp_path_factory.mktemp("alone"), ALONE, slow={})))


@pytest.mark.parametrize("layout", matrix(LAYOUTS))
def test_a_block_goes_to_the_rank_that_has_run_dry_and_keeps_its_bits(
    tmp_path: Path, alone: dict[int, str], layout: str
) -> None:
    owners = LAYOUTS[layout]
    entries = run_toy(toy(tmp_path, owners))
    assert bits(entries) == alone
    found = moves(tmp_path)
    assert found, "nothing moved: the test shows nothing"
    assert json.loads((tmp_path / "report.json").read_text())["take_overs"] == len(found)
    giver = next(rank for rank, owned in enumerate(owners) if 0 in owned)
    assert {move["source"] for move in found} == {giver}
    for move in found:
        assert 0 < move["step"] < 80
        assert entries[move["unit"]].rank == move["target"]
    stay = {0, 1, 2} - {move["unit"] for move in found}
    assert {entries[block].rank for block in stay} == {giver}


def case_of(run_dir: Path, case: str, **settings: Any) -> Toy:
    """Return a stage in which a block moves: of a broadcast, or of ranks that run the teacher themselves."""
    if case in LAYOUTS:
        return toy(run_dir, LAYOUTS[case], **settings)
    strategy, owners, budgets = SELF_FED[case]
    given = {"strategy": strategy, "budgets": budgets, "slow": dict.fromkeys(range(4), 0.03)} | settings
    return toy(run_dir, owners, **given)


def run_self_fed(run_dir: Path, case: str, **settings: Any) -> dict[int, Entry]:
    """Run the case and assert that something moves."""
    owners = SELF_FED[case][1]
    entries = run_toy(case_of(run_dir, case, **settings))
    found = moves(run_dir)
    assert found, "nothing moved: the test shows nothing"
    assert {move["source"] for move in found} == {next(rank for rank, owned in enumerate(owners) if 1 in owned)}
    for move in found:
        assert 0 < move["step"] < 80
        assert entries[move["unit"]].rank == move["target"] != move["source"]
    return entries


@pytest.mark.parametrize("case", matrix(SELF_FED))
def test_a_rank_that_runs_the_teacher_itself_takes_blocks_and_keeps_their_bits(tmp_path: Path, case: str) -> None:
    alone = run_toy(toy(tmp_path / "alone", ALONE, slow={}, budgets=SELF_FED[case][2]))
    assert bits(run_self_fed(tmp_path / "moved", case)) == bits(alone)


@pytest.mark.parametrize("case", matrix(SELF_FED))
def test_blocks_that_stop_at_a_plateau_after_they_were_taken_stop_at_the_same_step(tmp_path: Path, case: str) -> None:
    rule = {"checks": Checks(every=4, batches=2), "patience": 4}
    budgets = SELF_FED[case][2]
    alone = run_toy(toy(tmp_path / "alone", ALONE, slow={}, budgets=budgets, **rule))
    assert any(5 < entry.steps < 80 for entry in alone.values()), "the rule stopped nobody: the test shows nothing"
    entries = run_self_fed(tmp_path / "moved", case, **rule)
    assert bits(entries) == bits(alone)
    assert {block: entry.steps for block, entry in entries.items()} == {b: entry.steps for b, entry in alone.items()}


def test_blocks_stay_where_a_dry_rank_has_no_room_for_them_or_rank_0_for_their_batches(tmp_path: Path) -> None:
    enough = Memory(resident=0, student=(5, 5, 5, 47), step=(0,) * 4, boundary=(1,) * 5, window=2, limit=64)
    assert run_toy(toy(tmp_path / "enough", LAYOUTS["from rank 0"], memory=enough))[0].rank == 1
    for student in ((5, 5, 5, 48), (5, 6, 5, 47)):
        run_dir = tmp_path / f"{student}"
        entries = run_toy(toy(run_dir, LAYOUTS["from rank 0"], memory=replace(enough, student=student)))
        assert [entries[block].rank for block in range(4)] == [0, 0, 0, 1]
        assert moves(run_dir) == []


def test_blocks_stay_where_take_overs_are_not_wanted(tmp_path: Path) -> None:
    run_toy(toy(tmp_path, LAYOUTS["from rank 0"], take_over=False))
    assert moves(tmp_path) == []


class SlowTeacher:
    """A teacher whose every pass takes as long as a step of the block beside it."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)

    def run(self, *arguments: Any, **options: Any) -> dict[int, Tensor]:
        time.sleep(SLOW[0])
        return self._chain.run(*arguments, **options)


def has_a_slow_teacher(rank: int, world_size: int, environment: Mapping[str, str], settings: Toy) -> None:
    usual = ranks.toy_chain
    ranks.toy_chain = lambda sample: SlowTeacher(usual(sample))
    toy_rank(rank, world_size, environment, settings)


def test_the_last_block_of_rank_0_leaves_it_to_its_teacher(tmp_path: Path) -> None:
    run_ranks(has_a_slow_teacher, 2, toy(tmp_path, ((0,), (3,)), budgets={0: 80, 3: 5}))
    assert [(move["unit"], move["target"]) for move in moves(tmp_path)] == [(0, 1)]


def notes_owners(rank: int, world_size: int, environment: Mapping[str, str], settings: Toy) -> None:
    usual, expected = Collector.moved, list[tuple[int, int]]()

    def noted(self: Collector, block: int, owner: int) -> None:
        expected.append((block, owner))
        usual(self, block, owner)

    Collector.moved = noted  # type: ignore[method-assign]
    toy_rank(rank, world_size, environment, settings)
    (Path(settings.run_dir) / f"expected{rank}.json").write_text(json.dumps(expected))


def test_a_block_is_expected_from_the_rank_that_it_went_to(tmp_path: Path) -> None:
    run_ranks(notes_owners, 3, toy(tmp_path, LAYOUTS["between others"]))
    expected = json.loads((tmp_path / "expected0.json").read_text())
    assert expected == [[move["unit"], move["target"]] for move in moves(tmp_path)]
    assert expected, "nothing moved: the test shows nothing"


def test_blocks_that_stop_at_a_plateau_stop_at_the_same_step_wherever_they_are(tmp_path: Path) -> None:
    rule = {"checks": Checks(every=2, batches=2), "patience": 3, "budgets": BUDGETS}
    alone = run_toy(toy(tmp_path / "alone", ALONE, slow={}, **rule))
    assert any(5 < entry.steps < 80 for entry in alone.values()), "the rule stopped nobody: the test shows nothing"
    entries = run_toy(toy(tmp_path / "moved", LAYOUTS["between others"], **rule))
    assert moves(tmp_path / "moved")
    assert bits(entries) == bits(alone)
    assert {block: entry.steps for block, entry in entries.items()} == {b: entry.steps for b, entry in alone.items()}


def test_a_block_that_diverges_after_it_has_moved_keeps_the_weights_that_it_would_have_kept(tmp_path: Path) -> None:
    fault: dict[str, Any] = {"nan_at": (0, 75), "checkpoint_every": 30}
    alone = run_toy(toy(tmp_path / "alone", ALONE, slow={}, **fault))
    entries = run_toy(toy(tmp_path / "moved", LAYOUTS["from rank 0"], **fault))
    assert [move["unit"] for move in moves(tmp_path / "moved")] == [0]
    assert (entries[0].status, entries[0].diverged_at, entries[0].steps, entries[0].rank) == ("diverged", 75, 60, 1)
    assert bits(entries) == bits(alone)


def state_comes_last(
    rank: int, world_size: int, environment: Mapping[str, str], settings: Toy, num_done: int, pause_s: float
) -> None:
    """A state is taken only some time after so many of the blocks that did not move are in the ledger."""
    receive, folder = handover.receive_blob, Path(settings.run_dir)

    def late(group: PairGroup, size: int) -> bytes:
        deadline = time.monotonic() + 25
        while sum((folder / "blocks" / f"0{block}.safetensors").exists() for block in (1, 2)) < num_done:
            assert time.monotonic() < deadline, "the others have waited"
            time.sleep(0.02)
        time.sleep(pause_s)
        return receive(group, size)

    handover.receive_blob = late
    toy_rank(rank, world_size, environment, settings)


@pytest.mark.parametrize("case", matrix([*LAYOUTS, *list(SELF_FED)[:3]]))
def test_nobody_waits_for_a_state_that_is_long_on_its_way(tmp_path: Path, case: str) -> None:
    settings = case_of(tmp_path / "late", case)
    alone = run_toy(replace(settings, run_dir=str(tmp_path / "alone"), owners=ALONE, strategy="broadcast", slow={}))
    run_ranks(state_comes_last, len(settings.owners), settings, 1, 0.0)
    assert moves(tmp_path / "late"), "nothing moved: the test shows nothing"
    assert bits(Ledger(tmp_path / "late").entries) == bits(alone)


def test_a_rank_that_has_nothing_left_stays_until_the_block_that_it_gave_away_has_come(
    tmp_path: Path, alone: dict[int, str]
) -> None:
    run_ranks(state_comes_last, 3, toy(tmp_path, LAYOUTS["between others"]), 2, 1.0)
    assert [move["unit"] for move in moves(tmp_path)] == [0]
    assert bits(Ledger(tmp_path).entries) == alone


def dies_handing_over(
    rank: int, world_size: int, environment: Mapping[str, str], settings: Toy, victim: int, folder: str
) -> None:
    """The victim vanishes with the state on its way; the others write down what they say."""
    if rank == victim:
        handover.send_blob = handover.receive_blob = lambda *_: os._exit(9)
    try:
        toy_rank(rank, world_size, environment, settings)
    except DistillError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
        raise


DEATHS = [
    ("from rank 0", 1),
    ("to rank 0", 1),
    ("between others", 1),
    ("between others", 2),
    ("relay, to the rank behind", 1),
    ("relay, to the rank that passes their batches on", 1),
    ("replicate", 1),
]


@pytest.mark.parametrize(("case", "victim"), matrix(DEATHS))
def test_a_death_in_the_middle_of_a_hand_over_is_told_and_a_restart_ends_with_the_same_bits(
    tmp_path: Path, case: str, victim: int
) -> None:
    told = tmp_path / "0.txt"
    broken = case_of(tmp_path / "run", case, checkpoint_every=4)
    alone = run_toy(replace(broken, run_dir=str(tmp_path / "alone"), owners=ALONE, strategy="broadcast", slow={}))
    context = run_ranks(dies_handing_over, len(broken.owners), broken, victim, str(tmp_path), join=False)
    assert context is not None
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        while not context.join(grace_period=20):
            pass
    deadline = time.monotonic() + 20
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "rank 0: " in told.read_text()
    assert f"rank {victim} failed" in told.read_text()
    assert f"read logs/rank{victim}.log" in told.read_text()
    again = replace(broken, owners=((0, 1), (2, 3)), slow={}, generation=2)
    assert bits(run_toy(again)) == bits(alone)
