"""What a plan is: which rank trains which student blocks, and how long that should take. No torch here.

Words and arithmetic are those of docs/architecture.md: T_k teacher forward seconds of block k, S_k seconds of one
student step, b_k bytes of boundary k (the input of block k and the target of block k - 1).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise

from distill.network import Network


@dataclass(frozen=True)
class Costs:
    """Per-batch costs. `teacher_s[k]` and `student_s[k]` in seconds, `boundary_bytes` has one entry more than blocks.

    Rank r takes `slowness[r]` times as long as that (1 for every rank that is not listed).
    """

    teacher_s: tuple[float, ...]
    student_s: tuple[float, ...]
    boundary_bytes: tuple[int, ...]
    student_bytes: tuple[int, ...] = ()  # of the student's parameters, by block
    slowness: tuple[float, ...] = ()
    network: Network = field(default_factory=Network)
    read_s_per_byte: float = 0.0  # of recorded boundaries

    def slowness_of(self, rank: int) -> float:
        return self.slowness[rank] if rank < len(self.slowness) else 1.0


@dataclass(frozen=True)
class Span:
    """The steps that block `block` has still to do: `first` to `budget` - 1."""

    block: int
    first: int
    budget: int

    @property
    def steps(self) -> int:
        return self.budget - self.first


@dataclass(frozen=True)
class Plan:
    """Which rank owns which blocks (`owners[rank]`), from which step on (`spans`), and the prediction.

    In a relay rank r receives boundary `starts[r]` (rank 0: the images) and runs the teacher from there up to the start
    of the next rank that owns blocks. Other strategies have no `starts`.
    """

    strategy: str
    owners: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]
    predicted_makespan_s: float
    predicted_rank_s: tuple[float, ...]
    starts: tuple[int, ...] = ()
    recording_s: float = 0.0  # predicted for recording the teacher's activations before the stage begins, if they are

    @property
    def world_size(self) -> int:
        return len(self.owners)

    def spans_of(self, rank: int) -> tuple[Span, ...]:
        """The spans of the blocks that `rank` owns, in block order."""
        return tuple(span for span in self.spans if span.block in self.owners[rank])

    @property
    def one_by_one(self) -> bool:
        """Whether a rank trains its blocks one after another, each with a teacher pass of its own."""
        return self.strategy in ("serial", "layerwise", "ddp")

    @property
    def shared(self) -> bool:
        """Whether all ranks train every block together, each on its rows of the batch; rank 0 owns the results."""
        return self.strategy == "ddp"

    def trained_by(self, rank: int) -> tuple[Span, ...]:
        """The spans of the blocks that `rank` trains, in block order."""
        return self.spans if self.shared else self.spans_of(rank)

    def has_work(self, rank: int) -> bool:
        """Whether a rank takes part: it has blocks to train, or runs the teacher for others."""
        return bool(self.trained_by(rank)) or (rank == 0 and self.strategy == "broadcast")

    def rank_before(self, rank: int) -> int | None:
        """The rank that passes activations on to `rank` in a relay; None where it begins with the images."""
        return max((r for r in range(rank) if self.starts and self.spans_of(r)), default=None)

    def rank_after(self, rank: int) -> int | None:
        """The rank that `rank` passes activations on to in a relay."""
        later = range(rank + 1, self.world_size)
        return min((r for r in later if self.starts and self.spans_of(r)), default=None)

    def blocks_behind(self, rank: int) -> frozenset[int]:
        """The blocks of all ranks behind `rank` in a relay."""
        later = range(rank + 1, self.world_size) if self.starts else ()
        return frozenset(span.block for r in later for span in self.spans_of(r))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        raw = json.loads(text)
        return Plan(
            strategy=raw["strategy"],
            owners=tuple(tuple(blocks) for blocks in raw["owners"]),
            spans=tuple(Span(**span) for span in raw["spans"]),
            predicted_makespan_s=raw["predicted_makespan_s"],
            predicted_rank_s=tuple(raw["predicted_rank_s"]),
            starts=tuple(raw["starts"]),
            recording_s=raw["recording_s"],
        )


def boundaries_of(blocks: Iterable[int]) -> frozenset[int]:
    """Return the boundaries that training these blocks needs: each block's input and target, shared ones once."""
    return frozenset(boundary for block in blocks for boundary in (block, block + 1))


def teacher_seconds(costs: Costs, spans: Iterable[Span]) -> float:
    """Seconds of teacher forward passes: each batch once, only as deep as the deepest block that still trains on it."""
    remaining = sorted((span for span in spans if span.steps > 0), key=lambda span: span.first)
    edges = sorted({edge for span in remaining for edge in (span.first, span.budget)})
    total = 0.0
    for low, high in pairwise(edges):
        deepest = max((span.block for span in remaining if span.first <= low < span.budget), default=-1)
        total += (high - low) * sum(costs.teacher_s[: deepest + 1])
    return total
