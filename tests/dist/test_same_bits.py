"""Invariant 1: the weights of every student block do not depend on the layout, nor on a crash in between."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from distill.data import Batch, Dataset
from distill.planning.schedule import Checks
from distill.storage.ledger import Entry, Ledger
from tests.dist.ranks import Toy, run_ranks, run_toy, toy_rank

ALONE = ((0, 1, 2, 3),)
LAYOUTS = [
    (((0, 3), (1, 2)), 2),
    (((), (0, 1, 2, 3)), 5),
    (((1,), (3, 0), (2,)), 3),
]


def bits(entries: dict[int, Entry]) -> dict[int, str]:
    return {block: entry.sha256 for block, entry in entries.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    run_dir = str(tmp_path_factory.mktemp("alone"))
    found = bits(run_toy(Toy(run_dir=run_dir, owners=ALONE)))
    assert len(set(found.values())) == 4
    return found


@pytest.mark.parametrize(("owners", "window"), LAYOUTS)
def test_any_placement_and_window_gives_the_bits_of_one_rank(
    tmp_path: Path, alone: dict[int, str], owners: tuple[tuple[int, ...], ...], window: int
) -> None:
    assert bits(run_toy(Toy(run_dir=str(tmp_path), owners=owners, window=window))) == alone


STRATEGIES = [
    ("replicate", ((0, 3), (1, 2))),
    ("layerwise", ((3, 0), (1, 2))),
    ("serial", ALONE),
    ("relay", ((0, 1), (2, 3))),
    ("relay", ((), (0, 1, 2), (), (3,))),
    ("relay", ((0,), (1,), (2, 3))),
]


@pytest.mark.parametrize(("strategy", "owners"), STRATEGIES)
def test_any_strategy_gives_the_bits_of_one_rank(
    tmp_path: Path, alone: dict[int, str], strategy: str, owners: tuple[tuple[int, ...], ...]
) -> None:
    assert bits(run_toy(Toy(run_dir=str(tmp_path), owners=owners, strategy=strategy))) == alone
    passes = {"serial": 4, "layerwise": 4, "replicate": 2, "relay": sum(map(bool, owners))}[strategy]
    assert json.loads((tmp_path / "report.json").read_text())["teacher_passes"] == 6 * passes


@pytest.mark.parametrize("strategy", ["serial", "layerwise", "ddp"])
def test_a_block_trained_alone_has_teacher_passes_for_its_own_steps_alone(tmp_path: Path, strategy: str) -> None:
    run_toy(Toy(run_dir=str(tmp_path), owners=((0, 1),), budgets={0: 2, 1: 5}, strategy=strategy))
    assert json.loads((tmp_path / "report.json").read_text())["teacher_passes"] == 2 + 5


TEACHER_RANKS = [
    (2, ((0, 3), (1, 2)), 2),
    (2, ((), (0, 1), (2, 3)), 4),
    (3, ((1,), (3, 0), (2,)), 2),
    (3, ((0,), (), (3, 2), (1,)), 3),
    (4, ((), (), (), (0, 1, 2, 3)), 2),
]


@pytest.mark.parametrize(("teacher_ranks", "owners", "window"), TEACHER_RANKS)
def test_any_number_of_teacher_ranks_gives_the_bits_of_one(
    tmp_path: Path, alone: dict[int, str], teacher_ranks: int, owners: tuple[tuple[int, ...], ...], window: int
) -> None:
    toy = Toy(run_dir=str(tmp_path), owners=owners, window=window, teacher_ranks=teacher_ranks)
    assert bits(run_toy(toy)) == alone
    report = json.loads((tmp_path / "report.json").read_text())
    assert 6 <= report["teacher_passes"] < 12, "no batch is taught twice, unless a rank was left behind"


def counts_ways_through_the_data(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    usual, begun = Dataset.train_batches, list[int]()

    def noted(self: Dataset, start: int, *arguments: Any, **options: Any) -> Iterator[Batch]:
        begun.append(start)
        return usual(self, start, *arguments, **options)

    Dataset.train_batches = noted  # type: ignore[method-assign]
    toy_rank(rank, world_size, environment, toy)
    (Path(toy.run_dir) / f"begun{rank}.json").write_text(json.dumps(begun))


def test_every_teacher_rank_goes_through_its_batches_once(tmp_path: Path) -> None:
    """Beginning anew would throw away what has been read ahead."""
    run_ranks(counts_ways_through_the_data, 2, Toy(run_dir=str(tmp_path), owners=((0, 3), (1, 2)), teacher_ranks=2))
    assert [json.loads((tmp_path / f"begun{rank}.json").read_text()) for rank in range(2)] == [[0], [1]]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_a_restart_with_another_number_of_teacher_ranks_leaves_no_trace(
    tmp_path: Path, alone: dict[int, str], before: int, after: int
) -> None:
    owners = ((0, 1), (2,), (3,))
    broken = Toy(
        run_dir=str(tmp_path), owners=owners, checkpoint_every=2, fail_at=(1, 5), teacher_ranks=before, slow={3: 0.02}
    )
    with pytest.raises(ProcessRaisedException, match="injected on rank 1 at step 5"):
        run_toy(broken)
    again = replace(broken, owners=((3,), (1, 0), (2,)), fail_at=None, teacher_ranks=after, generation=2, slow={})
    assert bits(run_toy(again)) == alone


def test_teacher_ranks_stop_for_blocks_that_end_early_on_any_of_them(tmp_path: Path) -> None:
    toy = Toy(
        run_dir=str(tmp_path),
        owners=((0,), (1,)),
        budgets={0: 4000, 1: 6},
        teacher_ranks=2,
        nan_at=(0, 2),
        slow={0: 0.02},
    )
    entries = run_toy(toy)
    assert (entries[0].status, entries[1].status) == ("diverged", "finished")
    assert json.loads((tmp_path / "report.json").read_text())["teacher_passes"] < 1000


def test_ranks_that_share_every_block_come_close_to_one_rank(tmp_path: Path, alone: dict[int, str]) -> None:
    alike = Toy(run_dir=str(tmp_path / "one"), owners=ALONE, strategy="ddp")
    assert bits(run_toy(alike)) == alone
    run_toy(Toy(run_dir=str(tmp_path / "two"), owners=(*ALONE, ()), strategy="ddp"))
    one, two = Ledger(tmp_path / "one"), Ledger(tmp_path / "two")
    assert set(two.entries) == set(one.entries)
    for block in one.entries:
        assert two.entries[block].rel_error_last == pytest.approx(one.entries[block].rel_error_last, rel=0.2)
        for name, expected in one.weights(block).items():
            if expected.is_floating_point() and "running" not in name:
                moved = (two.weights(block)[name] - expected).abs().max()
                assert 0 <= moved < 0.1, name
    assert bits(two.entries) != alone, "each rank has trained on everything"


def test_bf16_on_the_wire_rounds_for_near_and_far_students_alike(tmp_path: Path, alone: dict[int, str]) -> None:
    here = bits(run_toy(Toy(run_dir=str(tmp_path / "a"), owners=ALONE, wire_dtype=torch.bfloat16)))
    there = bits(run_toy(Toy(run_dir=str(tmp_path / "b"), owners=((0,), (1, 2, 3)), wire_dtype=torch.bfloat16)))
    assert here == there
    relayed = Toy(run_dir=str(tmp_path / "c"), owners=((0, 1), (2, 3)), wire_dtype=torch.bfloat16, strategy="relay")
    assert bits(run_toy(relayed)) == here
    taught = Toy(run_dir=str(tmp_path / "d"), owners=((0,), (2, 3), (1,)), wire_dtype=torch.bfloat16, teacher_ranks=2)
    assert bits(run_toy(taught)) == here
    assert not set(here.values()) & set(alone.values())


def test_a_teacher_in_bf16_gives_the_same_bits_under_any_strategy(tmp_path: Path, alone: dict[int, str]) -> None:
    def run(name: str, owners: tuple[tuple[int, ...], ...], strategy: str) -> dict[int, str]:
        toy = Toy(
            run_dir=str(tmp_path / name),
            owners=owners,
            strategy=strategy,
            wire_dtype=torch.bfloat16,
            teacher_amp="bf16",
        )
        return bits(run_toy(toy))

    here = run("here", ALONE, "broadcast")
    assert run("there", ((0,), (1, 2, 3)), "broadcast") == here
    assert run("relayed", ((0, 1), (2, 3)), "relay") == here
    assert not set(here.values()) & set(alone.values())


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [("adam", "broadcast", "broadcast"), ("sgd", "relay", "replicate"), ("rmsprop", "layerwise", "relay")],
)
def test_a_crash_and_a_restart_on_another_layout_leave_no_trace(
    tmp_path: Path, optimizer: str, before: str, after: str
) -> None:
    plain = Toy(run_dir=str(tmp_path / "plain"), owners=ALONE, optimizer=optimizer)
    expected = bits(run_toy(plain))
    broken = Toy(
        run_dir=str(tmp_path / "broken"),
        owners=((0, 1), (2, 3)),
        optimizer=optimizer,
        checkpoint_every=2,
        fail_at=(1, 5),
        strategy=before,
    )
    with pytest.raises(ProcessRaisedException, match="injected on rank 1 at step 5"):
        run_toy(broken)
    assert list((tmp_path / "broken" / "checkpoints").glob("*.safetensors"))
    owners = ((0,), (1,), (2, 3)) if after == "relay" else ((3,), (0,), (1, 2))
    again = Toy(
        run_dir=broken.run_dir, owners=owners, optimizer=optimizer, checkpoint_every=2, generation=2, strategy=after
    )
    assert bits(run_toy(again)) == expected


def test_the_plateau_rule_stops_blocks_at_the_same_step_on_any_layout(tmp_path: Path) -> None:
    rule = {"checks": Checks(every=2, batches=2), "patience": 1, "budgets": dict.fromkeys(range(4), 40)}
    here = run_toy(Toy(run_dir=str(tmp_path / "a"), owners=ALONE, **rule))
    there = run_toy(Toy(run_dir=str(tmp_path / "b"), owners=((2,), (0, 1, 3)), **rule))
    relayed = run_toy(Toy(run_dir=str(tmp_path / "c"), owners=((0,), (1, 2), (3,)), strategy="relay", **rule))
    alone = run_toy(Toy(run_dir=str(tmp_path / "d"), owners=((0, 1), (2, 3)), strategy="layerwise", **rule))
    taught = run_toy(Toy(run_dir=str(tmp_path / "e"), owners=((3,), (1,), (0, 2)), teacher_ranks=3, **rule))
    assert bits(here) == bits(there) == bits(relayed) == bits(alone) == bits(taught)
    assert any(entry.steps < 40 for entry in here.values()), "the rule stopped nobody: the test shows nothing"
    assert all(entry.rel_error_held_out is not None for entry in here.values())
