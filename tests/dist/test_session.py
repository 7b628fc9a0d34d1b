"""What ranks say and leave of a stage: how they spent it, and who of a group speaks for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.storage.checkpoint import Checkpoint, CheckpointFolder
from tests.dist.ranks import Toy, run_ranks, run_toy, toy_rank

MEBIBYTE = 2**20


def test_a_report_says_how_every_rank_spent_the_stage(tmp_path: Path) -> None:
    slow_s, steps = 0.1, 8
    run_toy(Toy(run_dir=str(tmp_path), owners=((0,), (1,)), budgets={0: steps, 1: steps}, slow={0: slow_s}))
    report = json.loads((tmp_path / "report.json").read_text())
    busy, waiting = report["ranks"]["0"], report["ranks"]["1"]
    assert busy["waited_s"] < 0.5 * slow_s * steps < waiting["waited_s"] < waiting["seconds"]
    assert slow_s * steps < busy["seconds"] <= report["makespan_s"]
    assert waiting["teacher_s"] == 0 < busy["teacher_s"] < busy["seconds"]
    for rank in (busy, waiting):
        assert 0 < rank["cpu_s"] < rank["seconds"]  # of one thread that sleeps or waits for most of the time
        assert rank["peak_memory_bytes"] > 100 * MEBIBYTE  # PyTorch alone


def notes_saves(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    usual, saved = CheckpointFolder.save, list[str]()

    def noted(self: CheckpointFolder, state: Checkpoint) -> Any:
        saved.append(state.name)
        return usual(self, state)

    CheckpointFolder.save = noted  # type: ignore[method-assign]
    toy_rank(rank, world_size, environment, toy)
    (Path(toy.run_dir) / f"saved{rank}.json").write_text(json.dumps(saved))


def test_only_the_first_rank_of_a_group_saves_and_reports(tmp_path: Path) -> None:
    toy = Toy(
        run_dir=str(tmp_path),
        owners=((0, 1), (2, 3), ()),
        budgets=dict.fromkeys(range(4), 4),
        strategy="relay",
        groups=((1, 2),),
        checkpoint_every=3,
    )
    run_ranks(notes_saves, 3, toy)
    saved = [json.loads((tmp_path / f"saved{rank}.json").read_text()) for rank in range(3)]
    assert [sorted(names) for names in saved] == [["00", "01"], ["02", "03"], []]
    reported = [json.loads((tmp_path / f"readings{rank}.json").read_text()) for rank in range(3)]
    assert [set(blocks) for blocks in reported] == [{0, 1}, {2, 3}, set()]


def notes_threads(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    toy_rank(rank, world_size, environment, toy)
    time.sleep(0.5)  # in which a thread that has been told to end does so
    names = [thread.name for thread in threading.enumerate()]
    (Path(toy.run_dir) / f"threads{rank}.json").write_text(json.dumps(names))


def test_a_rank_that_has_done_its_part_does_not_watch_for_what_others_finish(tmp_path: Path) -> None:
    budgets = dict.fromkeys(range(3), 1)
    toy = Toy(run_dir=str(tmp_path), owners=((0,), (1,), (2,)), budgets=budgets, strategy="relay", slow={2: 2.0})
    run_ranks(notes_threads, 3, toy)
    assert "announcements" not in json.loads((tmp_path / "threads1.json").read_text())
