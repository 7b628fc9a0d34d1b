"""Replicate: every rank runs the teacher itself, as deep as its own units need: no traffic, repeated work."""

from __future__ import annotations

from collections.abc import Sequence

from distill.planning.costs import Costs, Span
from distill.planning.plan import Plan, Source, Strategy


class Replicate(Strategy):
    """A teacher on every rank."""

    name = "replicate"
    source = Source.stretch
    steals = True
    automatic = True

    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        from distill.planning.placement.plans import plan_replicate

        return plan_replicate(costs, spans, world_size)
