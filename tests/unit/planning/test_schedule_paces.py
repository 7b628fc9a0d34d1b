"""The schedule over whole runs of ranks that are not equally fast, on a clock of their own."""

from collections import deque
from dataclasses import dataclass, field

import pytest

from distill.planning.costs import Span
from distill.planning.schedule import Address, Feed, Schedule
from tests.feeding import NEVER


@dataclass
class Outcome:
    """When each rank had trained on its last batch, and how many teacher passes that took."""

    ended: dict[int, float] = field(default_factory=dict)
    passes: int = 0
    seen: dict[int, list[Address]] = field(default_factory=dict)


def simulate(
    seconds: dict[int, float], *, budget: int, teacher_s: float = 0.1, window: int = 4, wake_s: float = 0.05
) -> Outcome:
    """Ranks that take `seconds[rank]` a step (rank 0 in line with the teacher), each with `window` slots for batches
    that are under way, and a schedule that is asked whenever a slot becomes free, and every `wake_s`."""
    schedule = Schedule([Feed(rank, [Span(rank, 0, budget)], NEVER) for rank in seconds])
    outcome = Outcome(seen={rank: [] for rank in seconds})
    busy: dict[int, deque[float]] = {rank: deque() for rank in seconds}  # when each batch under way will be done
    now = 0.0
    while not schedule.finished:
        for queue in busy.values():
            while queue and queue[0] <= now:
                queue.popleft()
        ready = {rank for rank in seconds if rank == 0 or len(busy[rank]) < window}
        service = schedule.choose(ready, now)
        if service is None:
            freed = [queue[0] for queue in busy.values() if queue]
            now = min([now + wake_s, *freed])
            continue
        assert set(service.ranks) <= ready
        now += teacher_s
        outcome.passes += 1
        schedule.served(service, now)
        for rank in service.ranks:
            outcome.seen[rank].append(service.address)
            if rank == 0:
                now += seconds[0]
                outcome.ended[0] = now
            else:
                start = max([now, *busy[rank]])
                busy[rank].append(start + seconds[rank])
                outcome.ended[rank] = start + seconds[rank]
    return outcome


class TestSimulatedRanks:
    @pytest.mark.parametrize(
        "seconds",
        [{0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.61, 2: 0.63}, {0: 0.3, 1: 0.9}, {0: 0.9, 1: 0.1}, {1: 1.0, 2: 1.3}],
        ids=str,
    )
    def test_every_rank_sees_every_batch_once_and_in_order(self, seconds: dict[int, float]) -> None:
        outcome = simulate(seconds, budget=50)
        assert all(seen == [Address(step) for step in range(50)] for seen in outcome.seen.values())

    @pytest.mark.parametrize(
        "seconds",
        [
            {0: 0.5, 1: 0.6},
            {0: 0.5, 1: 0.62, 2: 0.65},
            {0: 0.45, 1: 0.6, 2: 0.6, 3: 0.7},
            {1: 1.0, 2: 1.1},
            {1: 1.0, 2: 1.1, 3: 1.2},
        ],
        ids=str,
    )
    def test_ranks_of_about_equal_speed_cost_almost_no_extra_passes(self, seconds: dict[int, float]) -> None:
        assert simulate(seconds, budget=100).passes <= 1.02 * 100

    @pytest.mark.parametrize("slow", [{3: 6.0}, {3: 6.0, 4: 9.0}], ids=str)
    @pytest.mark.parametrize("fast", [{0: 0.5, 1: 0.6, 2: 0.5}, {1: 0.6, 2: 0.5}], ids=str)
    def test_a_rank_ten_times_slower_does_not_delay_the_others(
        self, fast: dict[int, float], slow: dict[int, float]
    ) -> None:
        alone = simulate(fast, budget=100)
        together = simulate(fast | slow, budget=100)
        for rank in fast:
            assert together.ended[rank] <= 1.3 * alone.ended[rank]
        for rank, pace in slow.items():  # it trains without a pause from its first batch to its last
            assert together.ended[rank] <= 1.1 * 100 * pace

    def test_a_slow_rank_costs_at_most_a_pass_of_its_own_for_each_of_its_batches(self) -> None:
        assert 100 < simulate({0: 0.5, 1: 6.0}, budget=100).passes <= 2 * 100

    def test_others_stay_together_while_a_slow_rank_is_behind(self) -> None:
        # 3 x 100 would be a pass for everybody alone.
        assert simulate({0: 0.5, 1: 0.6, 2: 0.55, 3: 6.0}, budget=100).passes <= 2 * 100
