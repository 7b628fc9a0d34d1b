"""A relay in groups: ranks that share every batch come close to one rank, and stay equal among themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from distill.blocks.chain import Boundary
from distill.distributed.edges.receiver import BoundaryReceiver
from distill.distributed.transport import Averager
from distill.engine.streams import factory
from distill.planning.schedule import Address
from distill.storage.ledger import Ledger
from tests.dist.ranks import Toy, digest, run_ranks, run_toy, toy_rank

ALONE = ((0, 1, 2, 3),)
GROUPS = [  # owners, groups: one rank before two, two before one, two before two, two before three (other rows)
    (((0, 1), (2, 3), ()), ((1, 2),)),
    (((0, 1), (), (2, 3)), ((0, 1),)),
    (((0,), (), (1, 2, 3), ()), ((0, 1), (2, 3))),
    (((0, 1), (), (2, 3), (), ()), ((0, 1), (2, 3, 4))),
]


def relayed(run_dir: Path, owners: tuple[tuple[int, ...], ...], groups: tuple[tuple[int, ...], ...]) -> Toy:
    return Toy(run_dir=str(run_dir), owners=owners, strategy="relay", groups=groups)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    run_dir = tmp_path_factory.mktemp("alone")
    run_toy(Toy(run_dir=str(run_dir), owners=ALONE))
    return Ledger(run_dir)


def moved(one: Ledger, other: Ledger, block: int) -> float:
    """How far a block's weights are from the other's, relatively."""
    pairs = [
        (weights, other.weights(block)[name])
        for name, weights in one.weights(block).items()
        if weights.is_floating_point() and "running" not in name
    ]
    difference = torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt()
    return float(difference / torch.stack([a.square().sum() for a, _ in pairs]).sum().sqrt())


@pytest.mark.parametrize(("owners", "groups"), GROUPS)
def test_groups_come_close_to_one_rank_and_their_members_are_equal(
    tmp_path: Path, alone: Ledger, owners: tuple[tuple[int, ...], ...], groups: tuple[tuple[int, ...], ...]
) -> None:
    run_toy(relayed(tmp_path, owners, groups))
    found = Ledger(tmp_path)
    assert set(found.entries) == {0, 1, 2, 3}
    for block, entry in found.entries.items():
        assert entry.steps == 6
        assert entry.rank == next(rank for rank, owned in enumerate(owners) if block in owned)
        assert entry.rel_error_last == pytest.approx(alone.entries[block].rel_error_last, rel=0.2)
        assert moved(alone, found, block) < 0.03
    parameters = [json.loads((tmp_path / f"parameters{rank}.json").read_text()) for rank in range(len(owners))]
    for group in groups:
        assert parameters[group[0]]
        assert all(parameters[rank] == parameters[group[0]] for rank in group)


def notes_rows(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    """Every rank writes down its share in averages, its rows of the first batch of images, and how many rows it has
    headroom for from each rank before it."""
    average, receive = factory.Averager, factory.BoundaryReceiver
    noted: dict[str, Any] = {"share": None, "images": [], "received": []}

    def noted_average(*arguments: Any, share: float, **options: Any) -> Averager:
        noted["share"] = share
        return average(*arguments, share=share, **options)

    def noted_receive(*arguments: Any, boundaries: Mapping[int, Boundary], **options: Any) -> BoundaryReceiver:
        noted["received"] += [boundary.shape[0] for boundary in boundaries.values()]
        return receive(*arguments, boundaries=boundaries, **options)

    class Noted(factory.OwnBatches):
        def __call__(self) -> tuple[Address, Tensor] | None:
            found = super().__call__()
            if found is not None and found[0] == Address(0):
                noted["images"] = [digest([image]) for image in found[1]]
            return found

    factory.Averager, factory.BoundaryReceiver = noted_average, noted_receive  # type: ignore[assignment, misc]
    factory.OwnBatches = Noted  # type: ignore[misc]
    toy_rank(rank, world_size, environment, toy)
    (Path(toy.run_dir) / f"noted{rank}.json").write_text(json.dumps(noted))


def noted(run_dir: Path, what: str, num_ranks: int) -> list[Any]:
    return [json.loads((run_dir / f"noted{rank}.json").read_text())[what] for rank in range(num_ranks)]


def test_ranks_of_a_group_count_by_their_rows_which_make_up_the_batch(tmp_path: Path) -> None:
    run_ranks(notes_rows, 3, relayed(tmp_path, ((0, 1, 2, 3), (), ()), ((0, 1, 2),)))
    assert sorted(noted(tmp_path, "share", 3)) == [5 / 16, 5 / 16, 6 / 16]
    images = noted(tmp_path, "images", 3)
    assert sorted(map(len, images)) == [5, 5, 6]
    assert len(set(chain.from_iterable(images))) == 16


def test_ranks_of_a_group_have_room_for_their_rows_alone(tmp_path: Path) -> None:
    run_ranks(notes_rows, 5, relayed(tmp_path, *GROUPS[3]))
    assert noted(tmp_path, "received", 5) == [[], [], [6], [2, 3], [5]]  # of 8 + 8 rows


def test_groups_give_the_same_bits_after_a_crash(tmp_path: Path) -> None:
    toy = replace(relayed(tmp_path / "whole", ((0, 1), (2, 3), ()), ((1, 2),)), budgets=dict.fromkeys(range(4), 24))
    whole = run_toy(toy)
    broken = replace(toy, run_dir=str(tmp_path / "broken"), checkpoint_every=2, fail_at=(2, 5))
    with pytest.raises(ProcessRaisedException, match=r"injected on rank 2|averaging gradients with ranks \[2\]"):
        run_toy(broken)
    assert list((tmp_path / "broken" / "checkpoints").glob("*.safetensors"))
    again = run_toy(replace(broken, fail_at=None, generation=2))
    for block in (0, 1):
        assert again[block].sha256 == whole[block].sha256
    for block in (2, 3):  # but for the running statistics, which are those of the first rank's rows
        assert moved(Ledger(tmp_path / "whole"), Ledger(tmp_path / "broken"), block) == 0.0


def test_all_members_see_that_a_shared_block_diverges_though_one_of_them_has_the_bad_rows(tmp_path: Path) -> None:
    toy = replace(relayed(tmp_path, ((0, 1), (2, 3), ()), ((1, 2),)), nan_at=(3, 2), nan_ranks=(2,))
    entries = run_toy(toy)
    assert {block: entry.status for block, entry in entries.items()} == {
        0: "finished", 1: "finished", 2: "finished", 3: "diverged",
    }  # fmt: skip
    assert entries[3].diverged_at == 2
