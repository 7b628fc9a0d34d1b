"""How a budget of device seconds is divided: nothing for blocks where it is short, and never more steps than fit."""

import pytest

from distill.planning.time_shares import FEWEST, MOST, SHARE, block_share, block_steps, steps_within


def test_blocks_get_nothing_of_a_short_budget_and_a_share_of_a_long_one() -> None:
    assert block_share(100, 1) == 0
    assert 0 < block_share(500, 1) < block_share(700, 1) == block_share(100_000, 1) == SHARE


def test_more_ranks_give_blocks_more_but_never_most() -> None:
    assert SHARE < block_share(1000, 2) < block_share(1000, 4) <= MOST < 0.5
    assert block_share(1000, 1024) == MOST
    assert block_share(100, 1024) == 0


def test_steps_of_blocks_cost_their_share() -> None:
    steps = block_steps(1000.0, 0.5, 1)
    assert steps * 1.7 * 0.5 == pytest.approx(SHARE * 1000.0, rel=0.01)
    assert block_steps(2000.0, 1.0, 1) == steps  # a machine of half the speed, and twice the time


@pytest.mark.parametrize("training_s", [-5.0, 0.0, 10.0, 185.0])
def test_few_steps_of_blocks_are_none(training_s: float) -> None:
    assert block_steps(training_s, 0.5, 1) == 0
    assert block_steps(200.0, 0.5, 1) == 0 or block_steps(200.0, 0.5, 1) >= FEWEST


@pytest.mark.parametrize("seconds", [0.0, 3.0, 4.99, 5.0, 10.0, 26.0, 100.0, 1234.5])
@pytest.mark.parametrize("done", [0, 3, 9, 10, 57])
@pytest.mark.parametrize("epoch_s", [0.0, 2.5])
def test_as_many_steps_as_there_is_time_for_and_no_more(seconds: float, done: int, epoch_s: float) -> None:
    def taken(steps: int) -> float:
        ends = len({step // 10 for step in range(done, done + steps)})  # of epochs of ten steps
        return steps * 0.5 + ends * epoch_s

    steps = steps_within(seconds, step_s=0.5, epoch_s=epoch_s, done=done, steps_per_epoch=10)
    assert steps == 0 or taken(steps) <= seconds + 1e-9
    assert taken(steps + 1) > seconds or taken(steps + 10) > seconds
    if epoch_s == 0:
        assert steps == int(seconds / 0.5)
