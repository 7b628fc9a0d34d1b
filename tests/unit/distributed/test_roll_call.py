"""Which ranks are on one host, and which of them can share memory."""

from __future__ import annotations

import pytest

from distill.distributed.roll_call import RollCall, Seat


def seat(rank: int, host: str, machine: str = "m", processes: str = "p") -> Seat:
    return Seat(rank, host, machine, processes)


@pytest.mark.parametrize(
    ("seats", "hosts", "sharing"),
    [
        ([seat(0, "a"), seat(1, "a")], (0, 0), (0, 0)),
        ([seat(0, "a", "m"), seat(1, "b", "n"), seat(2, "a", "m")], (0, 1, 0), (0, 1, 0)),
        ([seat(0, "a", "m"), seat(1, "a", "n")], (0, 1), (0, 1)),  # two machines of one name
        ([seat(0, "a"), seat(1, "b")], (0, 1), (0, 1)),  # network namespaces of one machine
        ([seat(0, "a", processes="p"), seat(1, "a", processes="q")], (0, 0), (0, 1)),  # containers
    ],
)
def test_a_host_is_a_name_on_a_machine_and_memory_is_shared_among_processes_that_see_one_another(
    seats: list[Seat], hosts: tuple[int, ...], sharing: tuple[int, ...]
) -> None:
    found = RollCall(tuple(seats), "gloo")
    assert (found.hosts, found.sharing) == (hosts, sharing)
