"""Memory of a rank: the arithmetic, placements that keep to a limit, and what is counted and measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.job.memory import memory_limit
from distill.planning.costs import Costs, Span
from distill.planning.memory_model import Memory
from distill.planning.plan import STRATEGIES, Plan, memory_of
from distill.planning.strategies.choice import DoesNotFitError, rank_plans
from distill.profiling.peak_memory import PeakMemory, used_memory

MEMORY = Memory(
    resident=1000, student=(10, 20, 30), step=(5, 7, 6), boundary=(100, 10, 1, 2), window=4
)  # fmt: skip
SPANS = tuple(Span(block, 0, 10) for block in range(3))


def plan(strategy: str, *owners: tuple[int, ...], starts: tuple[int, ...] = ()) -> Plan:
    return Plan(strategy, owners, SPANS, 1.0, (1.0,) * len(owners), starts)


def test_rank_0_of_a_broadcast_keeps_what_waits_for_others() -> None:
    teacher = 3 * 100 + 113  # inside the largest block, and the boundaries of one batch
    waiting = (4 + 2) * (10 + 1 + 2)
    assert memory_of(plan("broadcast", (0,), (1, 2)), MEMORY) == (
        1000 + 10 + 5 + teacher + waiting,
        1000 + 20 + 30 + 7 + 2 * (10 + 1 + 2),
    )


def test_one_rank_sends_nothing() -> None:
    assert memory_of(plan("broadcast", (0, 1, 2)), MEMORY) == (1000 + 60 + 7 + 300 + 113,)


def test_a_relay_keeps_only_what_it_passes_on() -> None:
    first, second = memory_of(plan("relay", (0,), (1, 2), starts=(0, 1)), MEMORY)
    assert first == 1000 + 10 + 5 + 300 + 110 + 6 * 10
    assert second == 1000 + 50 + 7 + 300 + 13 + 2 * 10


def test_what_the_allocator_holds_back_is_reckoned_with_where_blocks_train() -> None:
    held = replace(MEMORY, held=500)
    for one in (plan("broadcast", (0,), (1, 2), ()), plan("relay", (0,), (1, 2), (), starts=(0, 1, 3))):
        more = [
            with_it - without for with_it, without in zip(memory_of(one, held), memory_of(one, MEMORY), strict=True)
        ]
        assert more == [500, 500, 0]
    limited = replace(MEMORY, limit=5000)
    assert limited.room(sends=True) == replace(limited, held=500, limit=5500).room(sends=True)


def test_captured_graphs_keep_copies_and_a_step_on_every_lane() -> None:
    captured = replace(MEMORY, lanes=2, teacher_graphs=1)
    [plain] = memory_of(plan("broadcast", (0, 1, 2)), MEMORY)
    [found] = memory_of(plan("broadcast", (0, 1, 2)), captured)
    inputs, step, teacher = 110 + 11 + 3, 6 + 7 - 7, 100 + 113
    assert found - plain == inputs + step + teacher


def test_measuring_takes_all_students_one_step_and_the_teacher() -> None:
    assert MEMORY.measuring == 10 + 20 + 30 + 7 + 3 * 100 + 100 + 110


def test_a_rank_without_blocks_has_what_every_rank_has() -> None:
    assert memory_of(plan("replicate", (0, 1, 2), ()), MEMORY)[1] == 1000


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=4, max_size=12),
    ranks=st.integers(1, 4),
    limit=st.integers(50, 700),
    name=st.sampled_from(["broadcast", "layerwise", "replicate", "relay"]),
)
def test_a_plan_keeps_to_its_limit_or_none_is_made(sizes: list[int], ranks: int, limit: int, name: str) -> None:
    blocks = len(sizes)
    costs = Costs(
        (0.1,) * blocks, tuple(1.0 + size % 3 for size in sizes), (1,) * (blocks + 1),
        memory=Memory(resident=10, student=tuple(sizes), step=(3,) * blocks, boundary=(1,) * (blocks + 1), window=2),
    )  # fmt: skip
    assert costs.memory is not None
    limited = replace(costs, memory=replace(costs.memory, limit=limit))
    spans = [Span(block, 0, 10) for block in range(blocks)]
    try:
        found = rank_plans([STRATEGIES[name]], limited, spans, ranks)[0]
    except DoesNotFitError:
        return
    assert max(memory_of(found, costs.memory)) <= limit
    assert found.predicted_makespan_s < 1e3
    free = STRATEGIES[name].plan(costs, spans, ranks)
    if max(memory_of(free, costs.memory)) * 2 < limit:
        assert found.predicted_makespan_s == pytest.approx(free.predicted_makespan_s, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    boundaries=st.lists(st.integers(1, 50), min_size=6, max_size=6),
    ranks=st.integers(1, 4),
    trained=st.sets(st.integers(0, 4), min_size=1),
    name=st.sampled_from([name for name in STRATEGIES if name != "cached"]),
)
def test_no_plan_needs_less_than_the_least(
    sizes: list[int], boundaries: list[int], ranks: int, trained: set[int], name: str
) -> None:
    blocks = len(sizes)
    boundary = tuple(boundaries[: blocks + 1])
    memory = Memory(resident=10, student=tuple(sizes), step=tuple(sizes), boundary=boundary, window=2)
    costs = Costs((0.1,) * blocks, (1.0,) * blocks, boundary, memory=memory)
    spans = [Span(block, 0, 10) for block in sorted(trained) if block < blocks] or [Span(0, 0, 10)]
    least = memory.least(span.unit for span in spans)
    assert least <= max(memory_of(STRATEGIES[name].plan(costs, spans, ranks), memory))
    only = replace(memory, student=(0,) * blocks, step=(0,) * blocks)
    alone = Plan("replicate", ((spans[0].unit,),), (spans[0],), 1.0, (1.0,))
    assert only.least([spans[0].unit]) == memory_of(alone, only)[0]


def test_a_limit_moves_blocks_from_a_fast_rank_that_has_no_room() -> None:
    memory = Memory(resident=0, student=(10,) * 6, step=(0,) * 6, boundary=(0,) * 7, window=2)
    costs = Costs((0.0,) * 6, (1.0,) * 6, (0,) * 7, slowness=(1.0, 5.0), memory=memory)
    spans = [Span(block, 0, 1) for block in range(6)]
    assert [len(owned) for owned in rank_plans([STRATEGIES["layerwise"]], costs, spans, 2)[0].owners] == [5, 1]
    limited = replace(costs, memory=replace(memory, limit=40))
    assert [len(owned) for owned in rank_plans([STRATEGIES["layerwise"]], limited, spans, 2)[0].owners] == [4, 2]
    with pytest.raises(DoesNotFitError):
        rank_plans([STRATEGIES["layerwise"]], replace(costs, memory=replace(memory, limit=20)), spans, 2)


def test_the_peak_counts_from_its_making_on() -> None:
    cpu = torch.device("cpu")
    torch.ones(50_000_000)  # 200 MB, gone before the counting begins
    peak = PeakMemory(cpu)
    before = used_memory(cpu)
    kept = torch.ones(25_000_000)
    grown = peak.read() - before
    assert 0.9 * kept.nbytes < grown < 1.5 * kept.nbytes


def test_things_that_refer_to_themselves_are_not_counted() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.memory, self.update = torch.ones(25_000_000), self.step

        def step(self) -> None: ...

    cpu = torch.device("cpu")
    before = used_memory(cpu)
    gc.disable()
    try:
        Trainer()
        assert used_memory(cpu) - before < 50e6
    finally:
        gc.enable()


def test_files_that_linux_keeps_in_memory_leave_room_for_a_plan(available: Callable[[int], None]) -> None:
    available(8 * 2**30)
    job = one_of(4, torch.device("cpu"))
    assert memory_limit(job) - used_memory(job.device) == pytest.approx(2 * 2**30, abs=2**26)


def one_of(ranks_here: int, device: torch.device) -> Any:
    """What memory_limit() looks at, for one of so many ranks on this host."""
    config = SimpleNamespace(plan=SimpleNamespace(memory_gib=None))
    return SimpleNamespace(config=config, device=device, control=SimpleNamespace(local_world_size=ranks_here))


@pytest.mark.parametrize(("ranks", "gpus", "share"), [(2, 4, 1), (4, 4, 1), (5, 2, 3)])
def test_ranks_that_share_a_gpu_share_its_memory(
    monkeypatch: pytest.MonkeyPatch, ranks: int, gpus: int, share: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (48, 60))
    job = one_of(ranks, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert memory_limit(job) == 5 + 48 // share, "what it has taken, and its share of what is free"
