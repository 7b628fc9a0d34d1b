"""What a plan sends over which line, and how long that takes beside the computing. No torch.

A line is what traffic shares: every rank's own way to the other ranks of its host, every host's way out and its way in.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from distill.planning.costs import Costs
from distill.planning.plan import Plan


def busiest_line_s(plan: Plan, costs: Costs) -> float:
    """Return the seconds in which the busiest line carries something."""
    lines: dict[tuple[str, int], float] = defaultdict(float)
    network = costs.network
    for flow in plan.how.flows(plan, costs):
        seconds = flow.size / network.link(flow.source, flow.target).bytes_per_s
        kind, number = network.line(flow.source, flow.target)
        lines[kind, number] += seconds
        if kind == "out":
            lines["in", network.way_out(flow.target)] += seconds
    return max(lines.values(), default=0.0)


def over_links(plan: Plan, costs: Costs) -> Plan:
    """Return the plan with a prediction that sees the links: computing and sending go on side by side, so the longer of
    the two counts, and the other for one batch, which the last rank waits for before it can begin."""
    network, sent = costs.network, plan.how.flows(plan, costs)
    if not sent:
        return plan
    hops = [
        flow.size / flow.batches / network.link(flow.source, flow.target).bytes_per_s
        + network.link(flow.source, flow.target).latency_s
        for flow in sent
    ]
    computing_s, batches = plan.predicted_makespan_s, max(flow.batches for flow in sent)
    first_s = sum(hops) if plan.how.passes_on else max(hops)  # hops in a row come one after another
    makespan_s = max(computing_s + first_s, busiest_line_s(plan, costs) + computing_s / batches)
    return replace(plan, predicted_makespan_s=makespan_s)
