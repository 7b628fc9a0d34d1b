"""Which moves are proposed: only such as shorten what is left, and never back and forth."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.engine.rebalance.moves import LEAST_GAIN, SET_UP_S, STATE_BYTES_PER_S, Headroom, Load, Work, chosen_moves
from distill.planning.memory_model import Memory

MEGABYTE = 1_000_000


def works(*seconds: float, first: int = 0, state_bytes: int = 0) -> tuple[Work, ...]:
    """Blocks with so many seconds left each."""
    return tuple(Work(first + n, 100, left / 100, state_bytes) for n, left in enumerate(seconds))


def test_a_dry_rank_takes_half_of_what_the_busiest_has_left() -> None:
    loads = {0: Load(works(10.0, 10.0, 10.0, 10.0)), 1: Load(()), 2: Load(works(25.0, first=10))}
    moves = chosen_moves(loads, {1})
    assert [(source, target) for _, source, target in moves] == [(0, 1), (0, 1)]
    assert len({block for block, _, _ in moves}) == 2


def test_two_dry_ranks_share() -> None:
    loads = {0: Load(works(10.0, 10.0, 10.0)), 1: Load(()), 2: Load(())}
    assert sorted(target for _, _, target in chosen_moves(loads, {1, 2})) == [1, 2]


def test_the_only_block_of_a_rank_stays_unless_it_also_teaches_or_is_slower() -> None:
    alone = Load(works(10.0))
    assert chosen_moves({0: Load(()), 1: alone}, {0}) == []
    assert chosen_moves({0: replace(alone, fixed_s=10.0), 1: Load(())}, {1}) == [(0, 0, 1)]
    assert chosen_moves({0: Load(()), 1: replace(alone, slowness=2.0)}, {0}) == [(0, 1, 0)]
    assert chosen_moves({0: Load((), slowness=2.0), 1: alone}, {0}) == []


def test_nothing_moves_where_the_teacher_sets_the_pace() -> None:
    assert chosen_moves({0: Load((), fixed_s=30.0), 1: Load(works(10.0, 10.0)), 2: Load(())}, {2}) == []


def test_a_state_too_large_to_send_in_time_stays() -> None:
    size = int(6.0 * STATE_BYTES_PER_S)
    assert chosen_moves({0: Load(works(5.0, 5.0)), 1: Load(())}, {1})
    assert chosen_moves({0: Load(works(5.0, 5.0, state_bytes=size)), 1: Load(())}, {1}) == []


def test_the_last_moments_are_not_worth_a_move() -> None:
    assert chosen_moves({0: Load(works(SET_UP_S, SET_UP_S)), 1: Load(())}, {1}) == []


ROOM = Headroom(left=(100, 50, 50), on_target=(60, 40, 40, 10), on_rank_0=(1, 1, 1, 1))


def test_a_block_goes_only_where_there_is_room_for_it() -> None:
    loads = {0: Load(()), 1: Load(()), 2: Load(works(30.0, 29.0))}
    assert chosen_moves(loads, {1}) == [(1, 2, 1)]
    assert chosen_moves(loads, {1}, replace(ROOM, left=(100, 60, 0))) == [(1, 2, 1)]
    assert chosen_moves(loads, {1}, replace(ROOM, on_target=(50, 51))) == [(0, 2, 1)]
    assert chosen_moves(loads, {1}, replace(ROOM, left=(100, 39, 0))) == []
    assert chosen_moves(loads, {0, 1}, replace(ROOM, left=(100, 39, 0))) == [(1, 2, 0)]


def test_room_that_a_move_takes_is_gone_for_the_next() -> None:
    loads = {0: Load(()), 1: Load(()), 2: Load(works(10.0, 10.0, 10.0, 10.0))}
    assert len(chosen_moves(loads, {1})) == 2
    assert chosen_moves(loads, {1}, ROOM) == [(1, 2, 1), (3, 2, 1)]
    assert chosen_moves(loads, {1}, replace(ROOM, left=(100, 49, 50))) == [(1, 2, 1)]


def test_rank_0_needs_room_for_batches_that_wait_while_a_state_is_on_its_way() -> None:
    loads = {0: Load(()), 1: Load(()), 2: Load(works(10.0, 10.0))}
    assert chosen_moves(loads, {1}, Headroom((9, 99, 99), (5, 5), (9, 9))) == [(0, 2, 1)]
    assert chosen_moves(loads, {1}, Headroom((8, 99, 99), (5, 5), (9, 9))) == []
    assert chosen_moves(loads, {0}, Headroom((14, 99, 99), (5, 5), (9, 9))) == [(0, 2, 0)]
    assert chosen_moves(loads, {0}, Headroom((13, 99, 99), (5, 5), (9, 9))) == []


def test_room_is_what_the_limit_leaves_beside_all_that_ranks_have_by_the_plan() -> None:
    memory = Memory(resident=1000, student=(10, 20, 30), step=(5, 7, 6), boundary=(100, 10, 1, 2), window=4)
    owners = ((0,), (1, 2))
    assert Headroom.of(None, owners, backlog=6) is None
    assert Headroom.of(memory, owners, backlog=6) is None
    headroom = Headroom.of(replace(memory, limit=5000), owners, backlog=6)
    teaching, sending = 3 * 100, (4 + 2) * 113
    taken = (10 + 3 * 110, 20 + 3 * 11, 30 + 3 * 3)
    assert headroom == Headroom(
        left=(4000 - 7 - teaching - sending - taken[0], 4000 - 7 - taken[1] - taken[2]),
        on_target=taken,
        on_rank_0=(6 * 110, 6 * 11, 6 * 3),
    )


seconds = st.floats(0.01, 100.0)
block_lists = st.lists(st.lists(st.tuples(seconds, st.integers(0, 500 * MEGABYTE)), max_size=4), min_size=2, max_size=5)


def loads_of(blocks: list[list[tuple[float, int]]], teacher_s: float, slowness: list[float]) -> dict[int, Load]:
    found, block = {}, 0
    for rank, owned in enumerate(blocks):
        mine = []
        for left, size in owned:
            mine.append(Work(block, 100, left / 100, size))
            block += 1
        found[rank] = Load(tuple(mine), teacher_s if rank == 0 else 0.0, slowness[rank])
    return found


def after(loads: dict[int, Load], moves: list[tuple[int, int, int]]) -> dict[int, Load]:
    """What is left once the moves have been made and paid for; computed here on its own."""
    left = dict(loads)
    for block, source, target in moves:
        (work,) = (work for work in left[source].works if work.unit == block)
        left[source] = replace(left[source], works=tuple(w for w in left[source].works if w.unit != block))
        scale = left[target].slowness / left[source].slowness
        there = replace(work, step_s=work.step_s * scale)
        price_s = SET_UP_S + work.state_bytes / STATE_BYTES_PER_S
        paid = left[target].fixed_s + price_s
        left[target] = replace(left[target], works=(*left[target].works, there), fixed_s=paid)
    return left


@given(block_lists, st.floats(0.0, 50.0), st.lists(st.floats(1.0, 3.0), min_size=5, max_size=5))
def test_moves_go_to_dry_ranks_and_each_shortens_what_its_two_ranks_have_left(
    blocks: list[list[tuple[float, int]]], teacher_s: float, slowness: list[float]
) -> None:
    loads = loads_of(blocks, teacher_s, slowness)
    dry = {rank for rank, load in loads.items() if not load.works}
    moves = chosen_moves(loads, dry)
    assert len({block for block, _, _ in moves}) == len(moves), "a block moves once"
    for count, (_, source, target) in enumerate(moves, start=1):
        before, then = after(loads, moves[: count - 1]), after(loads, moves[:count])
        assert target in dry
        longest = max(load.seconds for load in before.values())
        assert before[source].seconds == pytest.approx(longest)
        assert max(then[source].seconds, then[target].seconds) <= (1 - LEAST_GAIN) * longest + 1e-9
        assert max(load.seconds for load in then.values()) <= longest + 1e-9


@given(block_lists, st.lists(st.floats(1.0, 3.0), min_size=5, max_size=5), st.data())
def test_blocks_do_not_go_back_and_forth_until_the_end(
    blocks: list[list[tuple[float, int]]], slowness: list[float], data: st.DataObject
) -> None:
    """Time goes on and whoever runs dry takes over: the moves stay few."""
    loads, count = loads_of(blocks, 0.0, slowness), 0
    start = max(load.seconds for load in loads.values())
    while any(load.works for load in loads.values()):
        dry = {rank for rank, load in loads.items() if not load.works}
        moves = chosen_moves(loads, dry)
        count += len(moves)
        loads = after(loads, moves)
        share = data.draw(st.floats(0.1, 0.9))
        spent = share * max(load.seconds for load in loads.values())
        loads = {rank: _later(load, spent) for rank, load in loads.items()}
        if max(load.seconds for load in loads.values()) < 0.01 * start:
            break
    assert count <= 3 * sum(map(len, blocks))


def _later(load: Load, spent_s: float) -> Load:
    """The load after so many seconds, its blocks trained side by side."""
    whole = sum(work.seconds for work in load.works)
    share = max(0.0, 1 - spent_s / whole) if whole else 0.0
    left = tuple(replace(work, steps=int(share * work.steps)) for work in load.works)
    return replace(load, works=tuple(work for work in left if work.steps > 0), fixed_s=0.0)
