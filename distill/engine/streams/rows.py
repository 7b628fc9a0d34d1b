"""Which rows of a batch each rank of a group has, and which of them another group's ranks have. No torch here."""

from __future__ import annotations

from collections.abc import Sequence


def rows_of(position: int, num_ranks: int, num_rows: int) -> range:
    """Return the rows of the group's rank number `position`: one run of rows each, the first ranks one row more where
    they do not divide evenly."""
    each, more = divmod(num_rows, num_ranks)
    start = position * each + min(position, more)
    return range(start, start + each + (position < more))


def overlaps(own: range, group: Sequence[int], num_rows: int) -> dict[int, range]:
    """Return for the ranks of another group which of the rows `own` they have; ranks without any are left out."""
    found = {}
    for position, rank in enumerate(group):
        theirs = rows_of(position, len(group), num_rows)
        common = range(max(own.start, theirs.start), min(own.stop, theirs.stop))
        if common:
            found[rank] = common
    return found
