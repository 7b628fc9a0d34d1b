"""Broadcast: the first rank or ranks run the teacher for everybody and send each rank the boundaries of its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill.planning.costs import Costs, Span
from distill.planning.memory_model import Memory
from distill.planning.network import Flow
from distill.planning.plan import Plan, Source, Strategy
from distill.planning.unit import boundaries_of


@dataclass(frozen=True)
class Broadcast(Strategy):
    """With `teacher_ranks` ranks that run the teacher, taking the batches in turn; None: as many as pay."""

    teacher_ranks: int | None = None

    name = "broadcast"
    source = Source.served
    automatic = True
    settings = ("teacher_ranks",)

    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        from distill.planning.placement.plans import plan_broadcast, plan_teachers

        if self.teacher_ranks is None:
            return plan_teachers(costs, spans, world_size)
        return plan_broadcast(costs, spans, world_size, self.teacher_ranks)

    def configured(self, *, teacher_ranks: int | None, groups: bool) -> list[Strategy]:
        del groups
        return [replace(self, teacher_ranks=teacher_ranks)]

    def label(self, plan: Plan) -> str:
        return f"{self.name} with {plan.teacher_ranks} teacher ranks" if plan.teacher_ranks > 1 else self.name

    def fed_by_one(self, plan: Plan) -> bool:
        return plan.teacher_ranks == 1

    def teaches(self, plan: Plan, rank: int) -> bool:
        return rank < plan.teacher_ranks

    def taught_elsewhere(self, plan: Plan, rank: int) -> frozenset[int]:
        return frozenset(s.unit for s in plan.spans if plan.teaches(rank) and s.unit not in plan.owners[rank])

    def memory(self, plan: Plan, memory: Memory, rank: int) -> int:
        units = [span.unit for span in plan.spans_of(rank)]
        elsewhere = [span.unit for r in range(plan.world_size) if r != rank for span in plan.spans_of(r)]
        needed = memory.resident + memory.students(units)
        if rank >= plan.teacher_ranks or plan.teacher_ranks > 1:
            needed += memory.receiving(memory.activations(units))
        if rank < plan.teacher_ranks:
            needed += memory.teaching(memory.activations([*units, *elsewhere]))
            needed += memory.sending(memory.activations(elsewhere)) if elsewhere else 0
        return needed

    def flows(self, plan: Plan, costs: Costs) -> list[Flow]:
        found = []
        for rank in range(plan.world_size):
            owned = plan.spans_of(rank)
            steps = max((span.steps for span in owned), default=0)
            size = steps * sum(costs.boundary_bytes[k] for k in boundaries_of(owned))
            sources = [source for source in range(plan.teacher_ranks) if source != rank and plan.owners[rank]]
            found += [Flow(source, rank, size / plan.teacher_ranks, steps) for source in sources]
        return found
