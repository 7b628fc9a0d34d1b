"""What all ranks of a distill stage have in common, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill.blocks.chain import Chain
from distill.data import Dataset
from distill.distributed.store import Control
from distill.engine.streams.cached import Recorded
from distill.observability.trace import Trace
from distill.planning.memory_model import Memory
from distill.planning.plan import Plan
from distill.planning.schedule import Checks


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ranks of a distill stage have in common."""

    control: Control
    chain: Chain
    dataset: Dataset
    plan: Plan
    budget: int
    checks: Checks
    wire_dtype: torch.dtype
    wire_backend: str
    shared_memory: bool
    take_over: bool
    device: torch.device
    window: int
    timeout_s: float
    trace: Trace
    memory: Memory | None = None  # on rank 0: what take-overs have to keep to
    recorded: Recorded | None = None  # under a plan that reads what was recorded

    @property
    def moves_units(self) -> bool:
        """Whether rank 0, which feeds everybody, may move units to a rank that has run dry."""
        return self.take_over and self.plan.how.fed_by_one(self.plan) and self.plan.world_size > 1

    @property
    def steals(self) -> bool:
        """Whether a rank that has run dry may take blocks from others and run the teacher for them itself."""
        return self.take_over and self.plan.how.steals and self.plan.world_size > 1
