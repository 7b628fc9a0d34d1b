"""What is planned, trained, recorded and delivered: a candidate for the student of a stretch of blocks. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Channels = tuple[tuple[int, ...], ...]  # for every channel of a student's the teacher's channels whose mean it is


@dataclass(frozen=True)
class Unit:
    """A student for the blocks between the teacher's boundaries `input` and `target`, of which it reads the first and
    is to give the second. Several units may have one boundary in common, and candidates of one block have both.

    `number` is the unit's own within a job: it travels in plans and messages and names files. `key` is what its first
    weights are drawn for, together with the seed. Where the student's boundary is narrower than the teacher's, `reads`
    and `gives` tell what its channels are of the teacher's; None: the teacher's own.
    """

    number: int
    name: str
    input: int
    target: int
    key: str
    reads: Channels | None = None
    gives: Channels | None = None

    @classmethod
    def of_block(cls, block: int, name: str) -> Unit:
        """Return the only candidate of a block: it has the block's number, name and key."""
        return cls(block, name, block, block + 1, str(block))


class Stretch(Protocol):
    """What stands between two boundaries: a unit, or a span of its steps."""

    @property
    def input(self) -> int: ...

    @property
    def target(self) -> int: ...


def boundaries_of(stretches: Iterable[Stretch]) -> frozenset[int]:
    """Return the boundaries that training these needs: each one's input and target, shared ones once."""
    return frozenset(boundary for one in stretches for boundary in (one.input, one.target))


class Proposal(NamedTuple):
    """A student that a job may have: the candidate's name and the boundaries between which it stands."""

    candidate: str
    input: int
    target: int


def number_units(proposals: Iterable[Proposal], block_names: list[str]) -> list[Unit]:
    """Return a unit for every proposal, in their order.

    The first proposal for a block alone gets the block's number, name and key, so that a job with one candidate a block
    has the bits and the files that it always had; all others are numbered from the number of blocks on, and have their
    candidate in name and key.
    """
    units: list[Unit] = []
    first, following = set[int](), len(block_names)
    for candidate, start, end in proposals:
        if end == start + 1 and start not in first:
            first.add(start)
            units.append(Unit.of_block(start, block_names[start]))
            continue
        place = block_names[start] if end == start + 1 else f"{block_names[start]}..{block_names[end - 1]}"
        name = f"{place}:{candidate}"
        units.append(Unit(following, name, start, end, name))
        following += 1
    assert len({unit.key for unit in units}) == len(units), "two candidates of a block with one name"
    return units
