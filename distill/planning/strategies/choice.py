"""The choice among the plans of several strategies. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isfinite

from distill.planning.costs import Costs, Span
from distill.planning.plan import Plan, Strategy, memory_of
from distill.planning.relay.groups import gradient_bytes

CLOSE = 0.02  # makespans that differ by less are predicted equal: then what is sent, which disturbs, decides


class DoesNotFitError(Exception):
    """No plan fits in the memory of the ranks; the one that comes nearest needs `bytes_needed` on one of them."""

    def __init__(self, bytes_needed: int) -> None:
        super().__init__(bytes_needed)
        self.bytes_needed = bytes_needed


def rank_plans(strategies: Iterable[Strategy], costs: Costs, spans: Sequence[Span], world_size: int) -> list[Plan]:
    """Return the plans of these strategies that fit in memory by predicted makespan, but first of all, among those
    within CLOSE of the fastest, the one that sends least.

    Raises DoesNotFitError where none of them fits.
    """
    plans = [replace(one.plan(costs, spans, world_size), slowness=costs.slowness) for one in strategies]
    memory = costs.memory
    if memory is not None and memory.limit is not None:
        needed = [max(memory_of(plan, memory)) for plan in plans]
        known = [isfinite(plan.predicted_makespan_s) for plan in plans]  # no range of a relay may fit
        plans = [p for p, most, is_known in zip(plans, needed, known, strict=True) if is_known and most <= memory.limit]
        if not plans:
            raise DoesNotFitError(min(needed))
    ranked = sorted(plans, key=lambda plan: plan.predicted_makespan_s)
    close_s = (1 + CLOSE) * ranked[0].predicted_makespan_s
    close = [plan for plan in ranked if plan.predicted_makespan_s <= close_s]
    chosen = min(close, key=lambda plan: _bytes_sent(plan, costs))
    return [chosen, *(plan for plan in ranked if plan is not chosen)]


def _bytes_sent(plan: Plan, costs: Costs) -> float:
    return gradient_bytes(plan, costs) + sum(flow.size for flow in plan.how.flows(plan, costs))
