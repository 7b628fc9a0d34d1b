"""Which links are probed, and what is made of them."""

from __future__ import annotations

import pytest

from distill.job.network import MOST_HOSTS, probe_pairs, slowest
from distill.planning.network import Link, Network


@pytest.mark.parametrize(
    ("hosts", "pairs"),
    [
        ((0,), []),
        ((0, 0, 0), [(0, 1)]),
        ((0, 1), [(0, 1)]),
        ((0, 1, 1, 2), [(1, 2), (0, 1), (0, 3)]),
        ((0, 1, 0, 1), [(0, 2), (0, 1)]),
    ],
)
def test_one_pair_within_a_host_is_probed_and_one_to_every_other_host(
    hosts: tuple[int, ...], pairs: list[tuple[int, int]]
) -> None:
    assert probe_pairs(hosts) == pairs


def test_not_every_host_of_a_large_cluster_is_probed() -> None:
    assert len(probe_pairs(range(100))) == MOST_HOSTS


def test_the_slowest_link_stands_for_all() -> None:
    links = [Link(3e9, 1e-3), Link(1e9, 2e-3), Link(2e9, 3e-3)]
    assert slowest(links, Link()) == links[1]
    assert slowest([], links[0]) == links[0]


def test_a_link_without_limit_is_null_in_json() -> None:
    assert Link().facts() == {"bytes_per_s": None, "latency_s": 0.0, "sender_s_per_byte": 0.0}
    assert str(Link(1.25e9, 2e-4)) == "10 Gbit/s, 0.2 ms"
    assert str(Link()) == "no limit, 0 ms"
    for link in (Link(), Link(1e9, 1e-3, 2e-10)):
        assert Link.of_facts(link.facts()) == link


@pytest.mark.parametrize(
    ("hosts", "ranks", "expected"),
    [
        ((), 2, (0, 0)),
        ((0,), 3, (0, 0, 0)),
        ((0, 0), 1, (0,)),
        ((0, 1), 4, (0, 1, 2, 3)),
        ((0, 0, 1, 1), 3, (0, 0, 1)),
        ((0, 0, 1), 6, (0, 0, 1, 2, 2, 3)),
    ],
)
def test_further_ranks_are_on_further_hosts_where_there_are_several(
    hosts: tuple[int, ...], ranks: int, expected: tuple[int, ...]
) -> None:
    assert Network(hosts=hosts).resized(ranks).hosts == expected
