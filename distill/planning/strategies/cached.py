"""Cached: every rank reads what its units need from activations that are recorded before they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distill.planning.costs import Costs, Span
from distill.planning.plan import Plan, Source, Strategy


class Cached(Strategy):
    """What teacher.cache asks for, and plan.strategy cannot."""

    name = "cached"
    source = Source.recorded

    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        from distill.planning.placement.plans import plan_cached

        return replace(plan_cached(costs, spans, world_size), recording_s=costs.recording_s)

    def teaches(self, plan: Plan, rank: int) -> bool:
        return False
