"""Relay: every rank, or group of ranks, owns a contiguous range of blocks with the units in it, and runs the teacher
over it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from distill.planning.costs import Costs, Span
from distill.planning.memory_model import Memory
from distill.planning.network import Flow
from distill.planning.plan import Plan, Source, Strategy


class Relay(Strategy):
    """Ranges of single ranks."""

    name = "relay"
    source = Source.stretch
    passes_on = True
    steals = True
    automatic = True
    divides = True
    settings: tuple[str, ...] = ("groups",)

    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        from distill.planning.relay.relay_plans import plan_relay

        return plan_relay(costs, spans, world_size)

    def configured(self, *, teacher_ranks: int | None, groups: bool) -> list[Strategy]:
        del teacher_ranks
        return [self, RelayInGroups()] if groups else [self]

    def label(self, plan: Plan) -> str:
        return "relay in groups" if plan.groups else self.name

    def memory(self, plan: Plan, memory: Memory, rank: int) -> int:
        units = [span.unit for span in plan.trained_by(rank)]
        if not units:
            return memory.alone(units)
        start = plan.starts[rank]
        after = min((other for other in plan.starts if other > start), default=None)
        received = memory.receiving(memory.boundary[start]) if start else 0
        return memory.alone(units) + received + (memory.sending(memory.boundary[after]) if after is not None else 0)

    def flows(self, plan: Plan, costs: Costs) -> list[Flow]:
        found = []
        for first, second in pairwise(rank for rank, owned in enumerate(plan.owners) if owned):
            senders, receivers, start = plan.group_of(first), plan.group_of(second), plan.starts[second]
            steps = max((span.steps for span in plan.spans if span.input >= start), default=0)
            for place, rank in enumerate(receivers):
                source = senders[place * len(senders) // len(receivers)]
                found.append(Flow(source, rank, costs.boundary_bytes[start] * steps / len(receivers), steps))
        return found


class RelayInGroups(Relay):
    """Ranges that groups of ranks may share: each rank has rows of every batch. Its plans are relays."""

    name = "groups"
    automatic = False
    shares_batches = True
    settings = ()

    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        from distill.planning.relay.relay_plans import plan_groups

        return plan_groups(costs, spans, world_size)
