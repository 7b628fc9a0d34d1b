"""Runs of channels, some of which turn out to be the same: an addition makes those of two tensors one space.

Where only some of a space's channels are the same as others (an addition to a concatenation), it is split into parts.
"""

from __future__ import annotations

from dataclasses import dataclass


class MismatchError(Exception):
    """Channels that cannot be the same; the message says why, as the reason to keep them."""


class Space:
    """Channels that a layer puts out, divided into units. Once joined to another space, or split, it only points
    there."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.pinned: str | None = None  # why they must all stay
        self.parts: tuple[Space, ...] = ()
        self._parent: tuple[Space, int] | None = None

    def root(self) -> tuple[Space, int]:
        """Return the space that this one has become a part of, and how many of its units make one there."""
        space, each = self, 1
        while space._parent is not None:
            space, more = space._parent
            each *= more
        return space, each

    def join(self, root: Space) -> None:
        """Become the same as `root`; both are roots, and its units are as many or divide those of this one."""
        if root is not self:
            self._parent = root, self.units // root.units
            root.pinned = root.pinned or self.pinned

    def split(self, units: int) -> None:
        """Become two spaces, the first of which has so many units; this one is a root."""
        self.parts = Space(units), Space(self.units - units)
        for part in self.parts:
            part.pinned = self.pinned


@dataclass(frozen=True)
class Run:
    """Channels side by side: `each` of them for every unit of a space."""

    space: Space
    each: int

    def settled(self) -> tuple[Run, ...]:
        """Return the same channels by the spaces that theirs have become."""
        root, more = self.space.root()
        each = self.each * more
        return tuple(run for part in root.parts for run in Run(part, each).settled()) or (Run(root, each),)

    @property
    def width(self) -> int:
        """How many channels it has."""
        return self.space.units * self.each

    def divided(self, units: int) -> Space:
        """Return its space after making units of it so large that there are `units` of them."""
        (run,) = self.settled()
        if run.space.units % units:
            raise MismatchError("their groups do not fit together")
        if run.space.units > units:
            run.space.join(Space(units))
        return run.space.root()[0]


@dataclass(frozen=True)
class Channels:
    """Where the channels of a tensor are: the dimension, and the runs that they are."""

    dim: int
    runs: tuple[Run, ...]

    def settled(self) -> tuple[Run, ...]:
        """Return the runs by the spaces that theirs have become."""
        return tuple(piece for run in self.runs for piece in run.settled())

    def join(self, other: Channels) -> None:
        """Make these and those the same. Raises MismatchError."""
        if sum(run.width for run in self.runs) != sum(run.width for run in other.runs):
            raise MismatchError("it is combined with channels of other layers")
        _split_alike(self, other)
        for place in range(len(self.settled())):
            pair = self.settled()[place], other.settled()[place]
            units = min(run.space.units for run in pair)
            one, two = (run.divided(units) for run in pair)
            two.join(one)

    def pin(self, reason: str, *, always: bool = False) -> None:
        """Keep them all; the first reason stands, unless this one goes before others."""
        for run in self.settled():
            run.space.pinned = reason if always else run.space.pinned or reason


def _split_alike(one: Channels, other: Channels) -> None:
    """Split spaces until the runs of both are of the same widths."""
    while True:
        pairs = zip(one.settled(), other.settled(), strict=False)
        uneven = next((pair for pair in pairs if pair[0].width != pair[1].width), None)
        if uneven is None:
            return
        short, long = sorted(uneven, key=lambda run: run.width)
        units, rest = divmod(short.width, long.each)
        if rest:
            raise MismatchError("their groups do not fit together")
        long.space.split(units)
