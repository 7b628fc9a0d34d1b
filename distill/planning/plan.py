"""What a plan is: which rank trains which units, and how long that should take; and what a strategy says of its plans.
No torch here.

Words and arithmetic are those of docs/architecture.md: T_k teacher forward seconds of block k, S_u seconds of one step
of unit u, b_k bytes of boundary k.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum

from distill.planning.costs import Costs, Span
from distill.planning.memory_model import Memory
from distill.planning.network import Flow


@dataclass(frozen=True)
class Plan:
    """Which rank owns which units (`owners[rank]`), from which step on (`spans`), and the prediction.

    In a relay rank r receives boundary `starts[r]` (rank 0: the images) and runs the teacher from there up to the start
    of the next rank that owns units. Other strategies have no `starts`. In a broadcast the first `teacher_ranks` ranks
    take the batches in turn. The ranks of one of the `groups` train the units of its first rank together, each on its
    rows of every batch; a rank that is in none of them is on its own. `gap` is by how much the prediction may exceed
    that of the best placement under this strategy, relatively: 0 where none is
    better by more than half a per cent, None where nothing is proven.
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
        return self.how.label(self)

    @property
    def how(self) -> Strategy:
        """What its strategy says of it."""
        return STRATEGIES[self.strategy]

    @property
    def world_size(self) -> int:
        return len(self.owners)

    def slowness_of(self, rank: int) -> float:
        return self.slowness[rank] if rank < len(self.slowness) else 1.0

    def spans_of(self, rank: int) -> tuple[Span, ...]:
        """The spans of the units that `rank` owns."""
        return tuple(span for span in self.spans if span.unit in self.owners[rank])

    def group_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that share every batch of `rank`, itself included; the first owns what they train."""
        return next((group for group in self.groups if rank in group), (rank,))

    def trained_by(self, rank: int) -> tuple[Span, ...]:
        """The spans of the units that `rank` trains."""
        return self.spans_of(self.group_of(rank)[0])

    def teaches(self, rank: int) -> bool:
        """Whether a rank runs the teacher or a part of it."""
        return self.how.teaches(self, rank)

    def has_work(self, rank: int) -> bool:
        """Whether a rank takes part: it has units to train, or runs the teacher for others."""
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
        """The units of all ranks behind `rank` and its group in a relay."""
        later = range(self.group_of(rank)[-1] + 1, self.world_size) if self.starts else ()
        return frozenset(span.unit for r in later for span in self.spans_of(r))

    def taught_elsewhere(self, rank: int) -> frozenset[int]:
        """The units of other ranks that `rank` computes activations for."""
        return self.how.taught_elsewhere(self, rank)

    def started_in(self, seconds: float) -> Plan:
        """This plan where the first batch of a pass over the images takes so long to come."""
        passes = max((len(self.trained_by(rank)) for rank in range(self.world_size)), default=0)
        # One by one, every unit has a pass over the images of its own, and each pass waits for its first batch.
        start_s = seconds * (passes if self.how.one_by_one else min(passes, 1))
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
    return tuple(plan.how.memory(plan, memory, rank) for rank in range(plan.world_size))


class Source(Enum):
    """Where a rank's batches come from: the engine has a kind of stream for each."""

    served = "ranks that run the whole teacher serve everybody"
    stretch = "the rank's own stretch of the teacher, from the images or from what another rank passes on"
    recorded = "what was recorded before"


class Strategy(ABC):
    """A way to spread teacher and units over ranks: makes plans, and says what follows from one of its own.

    A new one is a file in planning/strategies/ and a line in the registry there; a word of config/choices.py makes it
    a choice of plan.strategy. Only where its batches come from nowhere that `Source` knows does the engine need a new
    stream (engine/streams/factory.py).
    """

    name: str
    source: Source
    passes_on = False  # ranks pass what they have computed on to the next, in a row
    one_by_one = False  # a rank trains its units one after another, each with teacher passes of its own
    steals = False  # a rank that runs dry may take units from others and run the teacher for them itself
    automatic = False  # plan.strategy=auto may choose it; the others exist to be measured against
    divides = False  # the teacher must be a chain whose blocks can run alone
    shares_batches = False  # ranks share the rows of a batch: results are close, not bitwise those of one rank
    settings: tuple[str, ...] = ()  # of the section plan, those that only it understands

    @abstractmethod
    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        """Return the best plan that it finds. Where nothing fits in memory, the makespan is infinite, or the plan needs
        more than there is: who chooses among plans looks."""

    def configured(self, *, teacher_ranks: int | None, groups: bool) -> list[Strategy]:
        """Return what to choose from under these settings, those that it does not understand left aside."""
        del teacher_ranks, groups
        return [self]

    def label(self, plan: Plan) -> str:
        """Name a plan, with what distinguishes it from others of the strategy."""
        return plan.strategy

    def fed_by_one(self, plan: Plan) -> bool:
        """Whether rank 0 alone feeds everybody, and so may move units to a rank that has run dry."""
        return False

    def teaches(self, plan: Plan, rank: int) -> bool:
        """Whether a rank runs the teacher or a part of it."""
        return bool(plan.trained_by(rank))

    def taught_elsewhere(self, plan: Plan, rank: int) -> frozenset[int]:
        """Return the units of other ranks that `rank` computes activations for."""
        return plan.units_behind(rank)

    def memory(self, plan: Plan, memory: Memory, rank: int) -> int:
        """Return the most bytes that a rank needs."""
        return memory.alone([span.unit for span in plan.trained_by(rank)])

    def flows(self, plan: Plan, costs: Costs) -> list[Flow]:
        """Return the activations that are sent; gradients travel within groups and are part of their prices."""
        return []


STRATEGIES: dict[str, Strategy] = {}  # by name; planning/strategies/ fills it
