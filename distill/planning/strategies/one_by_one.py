"""The strategies to measure against, in which a unit is trained by itself, with teacher passes of its own."""

from __future__ import annotations

from collections.abc import Sequence

from distill.planning.costs import Costs, Span
from distill.planning.plan import Plan, Source, Strategy


class Layerwise(Strategy):
    """Every unit is a job of its own, and a rank does its jobs one after another (Blakeney et al. 2021)."""

    name = "layerwise"
    source = Source.stretch
    one_by_one = True

    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        from distill.planning.placement.plans import plan_layerwise

        return plan_layerwise(costs, spans, world_size)


class Serial(Strategy):
    """Rank 0 alone trains one unit after another."""

    name = "serial"
    source = Source.stretch
    one_by_one = True

    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        from distill.planning.placement.plans import plan_serial

        return plan_serial(costs, spans, world_size)


class DataParallel(Strategy):
    """All ranks train the same unit, each on its rows of the batch."""

    name = "ddp"
    source = Source.stretch
    one_by_one = True
    shares_batches = True

    def plan(self, costs: Costs, spans: Sequence[Span], world_size: int) -> Plan:
        from distill.planning.placement.plans import plan_ddp

        return plan_ddp(costs, spans, world_size)
