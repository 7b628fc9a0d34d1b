"""A plan on imagined ranks and links, batch by batch on a simulated clock. Pure Python.

The order of events of a broadcast is the real one: the Schedule of protocol.py decides here as it does in a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from distill.network import Link
from distill.plan import Costs, Plan, Span, boundaries_of
from distill.protocol import Address, Checks, Feed, Schedule
from distill.sharing import as_single_ranks, gradient_bytes

RING_SLOTS = 2  # receive buffers of a rank: one being trained on, one being filled
IMPATIENCE_S = 0.005  # how often rank 0 looks again while it waits for a slot, as in a run
SAMPLE_STEPS = 200  # longer plans are simulated for this many steps and continued at the pace of their second half


@dataclass(frozen=True)
class Simulation:
    """How a plan goes: seconds until the last block is done, every rank's busy seconds, what is sent and computed."""

    plan: Plan
    makespan_s: float
    busy_s: tuple[float, ...]
    bytes_sent: float
    teacher_passes: float

    @property
    def mean_idle_share(self) -> float:
        """Mean over the ranks of the share of the makespan in which they do not compute."""
        return 1 - sum(self.busy_s) / (len(self.busy_s) * self.makespan_s) if self.makespan_s else 0.0


def simulate(plan: Plan, costs: Costs, *, window: int = 4) -> Simulation:
    """Return how `plan` goes with these costs and links; plans much longer than SAMPLE_STEPS steps are extrapolated."""
    longest = max((span.steps for span in plan.spans), default=0)
    if longest <= 2 * SAMPLE_STEPS:
        return _simulate(plan, costs, window)
    half = _simulate(_shortened(plan, SAMPLE_STEPS / longest), costs, window)
    whole = _simulate(_shortened(plan, 2 * SAMPLE_STEPS / longest), costs, window)
    more = (longest - 2 * SAMPLE_STEPS) / SAMPLE_STEPS

    def continued(short: float, long: float) -> float:
        return long + more * (long - short)

    return Simulation(
        plan,
        continued(half.makespan_s, whole.makespan_s),
        tuple(continued(short, long) for short, long in zip(half.busy_s, whole.busy_s, strict=True)),
        continued(half.bytes_sent, whole.bytes_sent),
        continued(half.teacher_passes, whole.teacher_passes),
    )


def _shortened(plan: Plan, share: float) -> Plan:
    """Return the plan with only the first part of every span's steps."""
    spans = tuple(Span(s.block, s.first, s.first + max(1, round(share * s.steps))) for s in plan.spans)
    scale = tuple(seconds * share for seconds in plan.predicted_rank_s)
    return replace(plan, spans=spans, predicted_rank_s=scale)


def _simulate(plan: Plan, costs: Costs, window: int) -> Simulation:
    if plan.strategy == "broadcast":
        return _broadcast(plan, costs, window)
    if plan.strategy == "relay":
        return _relay_of_groups(plan, costs, window) if plan.groups else _relay(plan, costs, window)
    passes = sum(span.steps for span in plan.spans) if plan.one_by_one else 0
    if not plan.one_by_one:
        passes = sum(max((span.steps for span in plan.spans_of(rank)), default=0) for rank in range(plan.world_size))
    return Simulation(plan, max(plan.predicted_rank_s), plan.predicted_rank_s, 0, passes)


@dataclass
class _Line:
    """A rank's way out: its sends leave one after another."""

    link: Link
    free_at: float = 0.0
    bytes_sent: float = 0.0

    def carry(self, size: float, ready_at: float) -> tuple[float, float]:
        """Return when `size` bytes have left and when they have arrived."""
        self.free_at = max(self.free_at, ready_at) + size / self.link.bytes_per_s
        self.bytes_sent += size
        return self.free_at, self.free_at + self.link.latency_s


@dataclass
class _Edge:
    """What is on its way to one rank: at most `window` batches wait for its RING_SLOTS buffers."""

    line: _Line
    window: int
    taken_at: list[float] = field(default_factory=list)  # when each batch was in a buffer of the receiver
    released_at: list[float] = field(default_factory=list)  # when the receiver was done with it

    def ready_at(self, now: float) -> float:
        """Return the first moment from `now` on at which another batch may be handed over."""
        pending = self.taken_at[-self.window :]
        return max(now, pending[0]) if len(pending) == self.window else now

    def send(self, size: float, now: float) -> float:
        """Hand over a batch; return when it has arrived."""
        behind = len(self.taken_at) - RING_SLOTS
        slot_free = self.released_at[behind] if behind >= 0 else 0.0
        left, arrived = self.line.carry(size, max(now, slot_free))
        self.taken_at.append(left)
        return arrived


def _students_s(costs: Costs, rank: int, blocks: Sequence[int]) -> float:
    return sum(costs.student_s[block] for block in blocks) * costs.slowness_of(rank)


def _teacher_s(costs: Costs, rank: int, first: int, last: int) -> float:
    """Seconds from boundary `first` to boundary `last`."""
    return sum(costs.teacher_s[first:last]) * costs.slowness_of(rank)


def _broadcast(plan: Plan, costs: Costs, window: int) -> Simulation:
    ranks = [rank for rank in range(plan.world_size) if rank == 0 or plan.spans_of(rank)]
    lines = {link: _Line(link) for link in (costs.network.within, costs.network.between)}
    edges = {rank: _Edge(lines[costs.network.link(0, rank)], window) for rank in ranks if rank}
    schedule = Schedule([Feed(rank, plan.spans_of(rank), Checks()) for rank in ranks])
    busy, done = [0.0] * plan.world_size, [0.0] * plan.world_size
    now, passes = 0.0, 0
    tick = max(IMPATIENCE_S, 0.02 * sum(costs.teacher_s))  # finer than any patience with steps as long as these
    while not schedule.finished:
        slots = {rank: edge.ready_at(now) for rank, edge in edges.items()}
        service = schedule.choose({0, *(rank for rank, at in slots.items() if at <= now)}, now)
        if service is None:
            now = min([now + tick, *(at for at in slots.values() if at > now)])
            continue
        blocks = {rank: schedule.feeds[rank].blocks_at(service.address) for rank in service.ranks}
        spent = _teacher_s(costs, 0, 0, 1 + max(block for owned in blocks.values() for block in owned))
        passes += 1
        for rank in service.ranks:
            if rank:
                size = sum(costs.boundary_bytes[boundary] for boundary in boundaries_of(blocks[rank]))
                spent += size * costs.network.link(0, rank).sender_s_per_byte
                arrived = edges[rank].send(size, now + spent)
                work = _students_s(costs, rank, blocks[rank])
                busy[rank] += work
                done[rank] = max(done[rank], arrived) + work
                edges[rank].released_at.append(done[rank])
        spent += _students_s(costs, 0, blocks.get(0, ()))
        schedule.served(service, now + spent)
        busy[0] += spent
        now += spent
    return Simulation(plan, max(now, *done), tuple(busy), sum(line.bytes_sent for line in lines.values()), passes)


def _relay(plan: Plan, costs: Costs, window: int) -> Simulation:
    chain = [rank for rank in range(plan.world_size) if plan.spans_of(rank)]
    # by receiver; every sender has a line of its own
    edges = {b: _Edge(_Line(costs.network.link(a, b)), window) for a, b in pairwise(chain)}
    feeds = {rank: Feed(rank, plan.spans_of(rank), Checks()) for rank in chain}
    busy, done = [0.0] * plan.world_size, [0.0] * plan.world_size
    everybody = Feed(-1, plan.spans, Checks())
    passes = 0
    while everybody.cursor is not None:
        address: Address = everybody.cursor
        passes += 1
        deepest = max(everybody.blocks_at(address))
        arrived = 0.0
        for rank, after in zip(chain, [*chain[1:], None], strict=True):
            first = plan.starts[rank]
            if deepest < first:
                break
            begin, end = max(done[rank], arrived), deepest + 1
            target = after if after is not None and deepest >= plan.starts[after] else None
            if target is not None:
                begin, end = edges[target].ready_at(begin), plan.starts[target]
            spent = _teacher_s(costs, rank, first, end)
            if target is not None:
                size = costs.boundary_bytes[end]
                spent += size * costs.network.link(rank, target).sender_s_per_byte
                arrived = edges[target].send(size, begin + spent)
            if feeds[rank].cursor == address:
                spent += _students_s(costs, rank, feeds[rank].blocks_at(address))
                feeds[rank].advance()
            busy[rank] += spent
            done[rank] = begin + spent
            if rank in edges:
                edges[rank].released_at.append(done[rank])
        everybody.advance()
    sent = sum(edge.line.bytes_sent for edge in edges.values())
    return Simulation(plan, max(done), tuple(busy), sent, passes)


def _relay_of_groups(plan: Plan, costs: Costs, window: int) -> Simulation:
    """A relay whose ranges have groups of ranks, each as one rank that is as much faster as they are together."""
    single = _relay(*as_single_ranks(plan, costs), window)
    firsts = [rank for rank in range(plan.world_size) if plan.owners[rank]]
    busy = [0.0] * plan.world_size
    passed_on = 0.0
    for index, first in enumerate(firsts):
        for rank in plan.group_of(first):
            busy[rank] = single.busy_s[index]
        if index:
            steps = max(span.steps for span in plan.spans if span.block >= plan.starts[first])
            passed_on += costs.boundary_bytes[plan.starts[first]] * steps
    return Simulation(
        plan, single.makespan_s, tuple(busy), passed_on + gradient_bytes(plan, costs), single.teacher_passes
    )
