"""What plans are made for: costs per batch, and the steps that units have still to do. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from distill.planning.memory_model import Memory
from distill.planning.network import Network
from distill.planning.unit import Unit


@dataclass(frozen=True)
class Costs:
    """Per-batch costs in seconds: `teacher_s` by block, `student_s` by the number of a unit (0 where none has it);
    `boundary_bytes` has one entry more than blocks.

    Rank r takes `slowness[r]` times as long as that (1 for every rank that is not listed).
    """

    teacher_s: tuple[float, ...]
    student_s: tuple[float, ...]
    boundary_bytes: tuple[int, ...]
    student_bytes: tuple[int, ...] = ()  # of a unit's parameters, by its number
    slowness: tuple[float, ...] = ()
    network: Network = field(default_factory=Network)
    batch_size: int | None = None  # images of a batch, where ranks may share them out
    memory: Memory | None = None
    teacher_fixed_s: tuple[float, ...] = ()  # of those seconds, what a share of the batch costs as much as all of it
    student_fixed_s: tuple[float, ...] = ()
    read_s_per_byte: float = 0.0  # of recorded boundaries
    recording_s: float = 0.0  # seconds, until they are recorded

    def slowness_of(self, rank: int) -> float:
        return self.slowness[rank] if rank < len(self.slowness) else 1.0


@dataclass(frozen=True)
class Span:
    """The steps that unit number `unit` has still to do, `first` to `budget` - 1, and the boundaries that it needs for
    them; where they are not given, those of the block with the unit's number."""

    unit: int
    first: int
    budget: int
    input: int = -1
    target: int = -1

    def __post_init__(self) -> None:
        if self.target < 0:
            object.__setattr__(self, "input", self.unit)
            object.__setattr__(self, "target", self.unit + 1)

    @classmethod
    def of(cls, unit: Unit, first: int, budget: int) -> Span:
        return cls(unit.number, first, budget, unit.input, unit.target)

    @property
    def steps(self) -> int:
        return self.budget - self.first


def in_order(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return spans as their units follow one another in the network."""
    return tuple(sorted(spans, key=lambda span: (span.input, span.target, span.unit)))


def teacher_seconds(costs: Costs, spans: Iterable[Span]) -> float:
    """Seconds of teacher forward passes: each batch once, only as deep as the deepest unit that still trains on it."""
    remaining = sorted((span for span in spans if span.steps > 0), key=lambda span: span.first)
    edges = sorted({edge for span in remaining for edge in (span.first, span.budget)})
    total = 0.0
    for low, high in pairwise(edges):
        deepest = max((span.target for span in remaining if span.first <= low < span.budget), default=0)
        total += (high - low) * sum(costs.teacher_s[:deepest])
    return total
