"""Ranks of one host show each other small tensors in memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from distill.distributed import shared_board
from distill.distributed.shared_board import share_board
from distill.distributed.transport import Averager, TransportError
from tests.dist.ranks import connect, run_ranks

EXCHANGES = 500


def exchange(rank: int, world_size: int, environment: dict[str, str], folder: str) -> None:
    torch.set_num_threads(1)
    others = averager(rank, world_size, environment)
    board = share_board(rank=rank, world_size=world_size, gather=others.gather, timeout_s=30.0, wanted=True)
    assert board is not None
    for number in range(EXCHANGES):
        shape = (2, 1 + number % 7)
        found = board.gather(torch.full(shape, float(1000 * rank + number)))
        assert found.shape == (world_size, *shape)
        assert found[:, 0, 0].tolist() == [1000.0 * peer + number for peer in range(world_size)]
    large = board.gather(torch.full((shared_board.PAGE,), float(rank)))  # goes the other way
    assert large[:, 0].tolist() == list(map(float, range(world_size)))
    assert share_board(rank=rank, world_size=world_size, gather=others.gather, timeout_s=30.0, wanted=False) is None
    Path(folder, f"{rank}").touch()
    others.close()


def averager(rank: int, world_size: int, environment: dict[str, str]) -> Averager:
    store = connect(rank, world_size, environment).store_for("board")
    return Averager(store, rank=rank, group=range(world_size), share=1.0, timeout_s=30.0, backend="gloo")


def leave(rank: int, world_size: int, environment: dict[str, str], folder: str) -> None:
    others = averager(rank, world_size, environment)
    board = share_board(rank=rank, world_size=world_size, gather=others.gather, timeout_s=30.0, wanted=True)
    assert board is not None
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(TransportError, match="rank 1 has ended amid a step"):
        board.gather(torch.zeros(3))
    assert time.monotonic() - start < 20
    Path(folder, "noticed").touch()


def test_what_all_ranks_show_is_read_by_all(tmp_path: Path) -> None:
    run_ranks(exchange, 3, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    run_ranks(leave, 2, str(tmp_path))
    assert (tmp_path / "noticed").exists()
