"""What a plan sends over which line, and how long that takes beside the computing. No torch.

A line is what traffic shares: every rank's own way to the other ranks of its host, every host's way out and its way in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from distill.planning.plan import Costs, Plan, Span
from distill.planning.unit import boundaries_of


@dataclass(frozen=True)
class Flow:
    """Bytes that one rank sends another over the whole plan, a part of them with each of `batches` batches."""

    source: int
    target: int
    size: float
    batches: int


def flows(plan: Plan, costs: Costs) -> list[Flow]:
    """Return the activations that a plan sends; gradients travel within groups and are part of their prices."""
    owning = [rank for rank, owned in enumerate(plan.owners) if owned]
    found = []
    if plan.strategy == "broadcast":
        for rank in owning:
            owned = plan.spans_of(rank)
            steps = _most_steps(owned)
            size = steps * sum(costs.boundary_bytes[k] for k in boundaries_of(owned))
            sources = [source for source in range(plan.teacher_ranks) if source != rank]
            found += [Flow(source, rank, size / plan.teacher_ranks, steps) for source in sources]
    for first, second in pairwise(owning) if plan.starts else ():
        senders, receivers, start = plan.group_of(first), plan.group_of(second), plan.starts[second]
        steps = _most_steps([span for span in plan.spans if span.input >= start])
        for place, rank in enumerate(receivers):
            source = senders[place * len(senders) // len(receivers)]
            found.append(Flow(source, rank, costs.boundary_bytes[start] * steps / len(receivers), steps))
    return found


def busiest_line_s(plan: Plan, costs: Costs) -> float:
    """Return the seconds in which the busiest line carries something."""
    lines: dict[tuple[str, int], float] = defaultdict(float)
    network = costs.network
    for flow in flows(plan, costs):
        seconds = flow.size / network.link(flow.source, flow.target).bytes_per_s
        kind, number = network.line(flow.source, flow.target)
        lines[kind, number] += seconds
        if kind == "out":
            lines["in", network.way_out(flow.target)] += seconds
    return max(lines.values(), default=0.0)


def over_links(plan: Plan, costs: Costs) -> Plan:
    """Return the plan with a prediction that sees the links: computing and sending go on side by side, so the longer of
    the two counts, and the other for one batch, which the last rank waits for before it can begin."""
    network, sent = costs.network, flows(plan, costs)
    if not sent:
        return plan
    hops = [
        flow.size / flow.batches / network.link(flow.source, flow.target).bytes_per_s
        + network.link(flow.source, flow.target).latency_s
        for flow in sent
    ]
    computing_s, batches = plan.predicted_makespan_s, max(flow.batches for flow in sent)
    first_s = max(hops) if plan.strategy == "broadcast" else sum(hops)  # a relay's hops come one after another
    makespan_s = max(computing_s + first_s, busiest_line_s(plan, costs) + computing_s / batches)
    return replace(plan, predicted_makespan_s=makespan_s)


def _most_steps(spans: Sequence[Span]) -> int:
    return max((span.steps for span in spans), default=0)
