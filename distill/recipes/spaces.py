"""Runs of channels, some of which turn out to be the same: an addition makes those of two tensors one space."""

from __future__ import annotations

from dataclasses import dataclass


class MismatchError(Exception):
    """Channels that cannot be the same; the message says why, as the reason to keep them."""


class Space:
    """Channels that a layer puts out, divided into units. Once joined to another space it only points there."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.pinned: str | None = None  # why they must all stay
        self._parent: tuple[Space, int] | None = None

    def root(self) -> tuple[Space, int]:
        """Return the space that this one has become a part of, and how many of its units make one there."""
        space, each = self, 1
        while space._parent is not None:
            space, more = space._parent
            each *= more
        return space, each

    def join(self, root: Space) -> None:
        """Become a part of `root`; both are roots, and its units are as many or divide those of this one."""
        if root is not self:
            self._parent = root, self.units // root.units
            root.pinned = root.pinned or self.pinned


@dataclass(frozen=True)
class Run:
    """Channels side by side: `each` of them for every unit of a space."""

    space: Space
    each: int

    def settled(self) -> Run:
        """Return the same channels by the space that theirs has become a part of."""
        root, more = self.space.root()
        return Run(root, self.each * more)

    @property
    def width(self) -> int:
        """How many channels it has."""
        return self.space.units * self.each

    def divided(self, units: int) -> Space:
        """Return its space after making units of it so large that there are `units` of them."""
        run = self.settled()
        if run.space.units % units:
            raise MismatchError("their groups do not fit together")
        if run.space.units > units:
            run.space.join(Space(units))
        return run.settled().space


@dataclass(frozen=True)
class Channels:
    """Where the channels of a tensor are: the dimension, and the runs that they are."""

    dim: int
    runs: tuple[Run, ...]

    def join(self, other: Channels) -> None:
        """Make these and those the same. Raises MismatchError."""
        if [run.width for run in self.runs] != [run.width for run in other.runs]:
            raise MismatchError("it is combined with channels of other layers")
        for pair in zip(self.runs, other.runs, strict=True):
            units = min(run.settled().space.units for run in pair)
            one, two = (run.divided(units) for run in pair)
            two.join(one)

    def pin(self, reason: str, *, always: bool = False) -> None:
        """Keep them all; the first reason stands, unless this one goes before others."""
        for run in self.runs:
            root = run.settled().space
            root.pinned = reason if always else root.pinned or reason
