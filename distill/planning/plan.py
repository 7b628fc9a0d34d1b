"""What a plan is: which rank trains which student blocks, and how long that should take. No torch here.

Words and arithmetic are those of docs/architecture.md: T_k teacher forward seconds of block k, S_k seconds of one
student step, b_k bytes of boundary k (the input of block k and the target of block k - 1).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
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


@dataclass(frozen=True)
class Plan:
    """Which rank owns which blocks (`owners[rank]`), from which step on (`spans`), and the prediction.

    In a relay rank r receives boundary `starts[r]` (rank 0: the images) and runs the teacher from there up to the start
    of the next rank that owns blocks. Other strategies have no `starts`. In a broadcast the first `teacher_ranks` ranks
    take the batches in turn. The ranks of one of the `groups` train the blocks of its first rank together, each on its
    rows of every batch; a rank that is in none of them is on its own. `gap` is by how much the prediction may exceed
    that of the best placement under this strategy, relatively: 0 where none is better, None where nothing is proven.
    Rank r takes `slowness[r]` times as long as a usual rank (1 for every rank that is not listed).
    """

    strategy: str
    owners: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]
    predicted_makespan_s: float
    predicted_rank_s: tuple[float, ...]
    starts: tuple[int, ...] = ()
    teacher_ranks: int = 1
    groups: tuple[tuple[int, ...], ...] = ()
    gap: float | None = None
    slowness: tuple[float, ...] = ()
    start_s: float = 0.0  # of the makespan, until there is a first batch: processes that decode images have to start
    recording_s: float = 0.0  # predicted for recording the teacher's activations before the stage begins, if they are

    @property
    def label(self) -> str:
        """The strategy with what distinguishes this plan within it."""
        if self.strategy == "broadcast" and self.teacher_ranks > 1:
            return f"broadcast with {self.teacher_ranks} teacher ranks"
        return "relay in groups" if self.starts and self.groups else self.strategy

    @property
    def world_size(self) -> int:
        return len(self.owners)

    def slowness_of(self, rank: int) -> float:
        return self.slowness[rank] if rank < len(self.slowness) else 1.0

    def spans_of(self, rank: int) -> tuple[Span, ...]:
        """The spans of the blocks that `rank` owns, in block order."""
        return tuple(span for span in self.spans if span.unit in self.owners[rank])

    @property
    def one_by_one(self) -> bool:
        """Whether a rank trains its blocks one after another, each with a teacher pass of its own."""
        return self.strategy in ("serial", "layerwise", "ddp")

    def group_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that share every batch of `rank`, itself included; the first owns what they train."""
        return next((group for group in self.groups if rank in group), (rank,))

    def trained_by(self, rank: int) -> tuple[Span, ...]:
        """The spans of the blocks that `rank` trains, in block order."""
        return self.spans_of(self.group_of(rank)[0])

    def teaches(self, rank: int) -> bool:
        """Whether a rank runs the teacher or a part of it."""
        if self.strategy == "cached":
            return False
        return rank < self.teacher_ranks if self.strategy == "broadcast" else bool(self.trained_by(rank))

    def has_work(self, rank: int) -> bool:
        """Whether a rank takes part: it has blocks to train, or runs the teacher for others."""
        return bool(self.trained_by(rank)) or self.teaches(rank)

    def group_before(self, rank: int) -> tuple[int, ...]:
        """The ranks that pass activations on to those of `rank` in a relay; none where it begins with the images."""
        owner = max((r for r in range(self.group_of(rank)[0]) if self.starts and self.spans_of(r)), default=None)
        return () if owner is None else self.group_of(owner)

    def group_after(self, rank: int) -> tuple[int, ...]:
        """The ranks that those of `rank` pass activations on to in a relay."""
        later = range(self.group_of(rank)[-1] + 1, self.world_size)
        owner = min((r for r in later if self.starts and self.spans_of(r)), default=None)
        return () if owner is None else self.group_of(owner)

    def units_behind(self, rank: int) -> frozenset[int]:
        """The blocks of all ranks behind `rank` and its group in a relay."""
        later = range(self.group_of(rank)[-1] + 1, self.world_size) if self.starts else ()
        return frozenset(span.unit for r in later for span in self.spans_of(r))

    def taught_elsewhere(self, rank: int) -> frozenset[int]:
        """The blocks of other ranks that `rank` computes activations for."""
        if self.strategy != "broadcast":
            return self.units_behind(rank)
        return frozenset(s.unit for s in self.spans if self.teaches(rank) and s.unit not in self.owners[rank])

    def started_in(self, seconds: float) -> Plan:
        """This plan where the first batch of a pass over the images takes so long to come."""
        passes = max((len(self.trained_by(rank)) for rank in range(self.world_size)), default=0)
        start_s = seconds * (passes if self.one_by_one else min(passes, 1))
        return replace(self, predicted_makespan_s=self.predicted_makespan_s + start_s, start_s=start_s)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        raw = json.loads(text)
        return Plan(
            strategy=raw["strategy"],
            owners=tuple(tuple(blocks) for blocks in raw["owners"]),
            spans=tuple(_span(**span) for span in raw["spans"]),
            predicted_makespan_s=raw["predicted_makespan_s"],
            predicted_rank_s=tuple(raw["predicted_rank_s"]),
            starts=tuple(raw["starts"]),
            teacher_ranks=raw.get("teacher_ranks", 1),  # plans of earlier versions have none of these
            groups=tuple(tuple(group) for group in raw.get("groups", ())),
            gap=raw.get("gap"),
            slowness=tuple(raw.get("slowness", ())),
            start_s=raw.get("start_s", 0.0),
            recording_s=raw.get("recording_s", 0.0),
        )


def _span(*, unit: int | None = None, block: int | None = None, **steps: int) -> Span:
    """Earlier versions wrote the number of a block."""
    number = block if unit is None else unit
    assert number is not None
    return Span(number, **steps)


def memory_of(plan: Plan, memory: Memory) -> tuple[int, ...]:
    """Return the most bytes that every rank of a plan needs."""
    return tuple(_rank_memory(plan, memory, rank) for rank in range(plan.world_size))


def _rank_memory(plan: Plan, memory: Memory, rank: int) -> int:
    units = [span.unit for span in plan.trained_by(rank)]
    if plan.strategy == "broadcast":
        elsewhere = [span.unit for r in range(plan.world_size) if r != rank for span in plan.spans_of(r)]
        needed = memory.resident + memory.students(units)
        if rank >= plan.teacher_ranks or plan.teacher_ranks > 1:
            needed += memory.receiving(memory.activations(units))
        if rank < plan.teacher_ranks:
            needed += memory.teaching(memory.activations([*units, *elsewhere]))
            needed += memory.sending(memory.activations(elsewhere)) if elsewhere else 0
        return needed
    if not plan.starts or not units:
        return memory.alone(units)
    after = min((start for start in plan.starts if start > plan.starts[rank]), default=None)
    received = memory.receiving(memory.boundary[plan.starts[rank]]) if plan.starts[rank] else 0
    return memory.alone(units) + received + (memory.sending(memory.boundary[after]) if after is not None else 0)


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
