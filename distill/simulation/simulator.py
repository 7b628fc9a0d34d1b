"""A plan on imagined ranks and links, batch by batch on a simulated clock. Pure Python.

The order of events of a broadcast is the real one: planning/schedule.py decides here as it does in a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from distill.planning.costs import Costs
from distill.planning.network import RING_SLOTS, Link
from distill.planning.plan import Plan, Source
from distill.planning.relay.groups import as_single_ranks, gradient_bytes
from distill.planning.schedule import Address, Checks, Feed, Schedule, Service, Turns

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
    # Two lengths, because their difference is free of what happens once: the first batches, and the last.
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
    spans = tuple(replace(s, budget=s.first + max(1, round(share * s.steps))) for s in plan.spans)
    scale = tuple(seconds * share for seconds in plan.predicted_rank_s)
    return replace(plan, spans=spans, predicted_rank_s=scale)


def _simulate(plan: Plan, costs: Costs, window: int) -> Simulation:
    if plan.how.source is Source.served:
        return _broadcast(plan, costs, window)
    if plan.how.passes_on:
        return _relay_of_groups(plan, costs, window) if plan.groups else _relay(plan, costs, window)
    together = sum if plan.how.one_by_one else max  # of a rank's units
    owned = [[span.steps for span in plan.spans_of(rank)] for rank in range(plan.world_size)]
    passes = sum(together(steps) for steps in owned if steps)
    return Simulation(plan, max(plan.predicted_rank_s), plan.predicted_rank_s, 0, passes)


@dataclass
class _Line:
    """What ranks with the same way out send on: one batch leaves after another."""

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
    handed_over: list[tuple[float, float]] = field(default_factory=list)  # bytes of each batch, and when
    taken_at: list[float] = field(default_factory=list)  # when each batch was in a buffer of the receiver
    arrived_at: list[float] = field(default_factory=list)
    released_at: list[float] = field(default_factory=list)  # when the receiver was done with it

    def ready_at(self, now: float) -> float:
        """Return the first moment from `now` on at which another batch may be handed over; infinite while unknown."""
        oldest = len(self.handed_over) - self.window
        if oldest < 0:
            return now
        return max(now, self.taken_at[oldest]) if oldest < len(self.taken_at) else math.inf

    def send(self, size: float, now: float) -> None:
        """Hand over a batch."""
        self.handed_over.append((size, now))
        self.settle()

    def settle(self) -> None:
        """Let batches leave as far as it is known when buffers are free."""
        while len(self.taken_at) < min(len(self.handed_over), len(self.released_at) + RING_SLOTS):
            number = len(self.taken_at)
            size, ready_at = self.handed_over[number]
            free_at = self.released_at[number - RING_SLOTS] if number >= RING_SLOTS else 0.0
            left, arrived = self.line.carry(size, max(ready_at, free_at))
            self.taken_at.append(left)
            self.arrived_at.append(arrived)

    @property
    def arrives_at(self) -> float:
        """When the receiver's next batch arrives; infinite while unknown."""
        number = len(self.released_at)
        return self.arrived_at[number] if number < len(self.arrived_at) else math.inf

    def release(self, at: float) -> None:
        """The receiver is done with its next batch."""
        self.released_at.append(at)
        self.settle()


def _students_s(costs: Costs, rank: int, units: Sequence[int]) -> float:
    return sum(costs.student_s[unit] for unit in units) * costs.slowness_of(rank)


def _teacher_s(costs: Costs, rank: int, first: int, last: int) -> float:
    """Seconds from boundary `first` to boundary `last`."""
    return sum(costs.teacher_s[first:last]) * costs.slowness_of(rank)


def _broadcast(plan: Plan, costs: Costs, window: int) -> Simulation:
    lines: dict[tuple[str, int], _Line] = {}
    teachers = [_Teacher(rank, plan, costs, window, lines) for rank in range(plan.teacher_ranks)]
    receivers = [_Receiver(rank, plan, costs, teachers) for rank in range(plan.world_size)]
    while unfinished := [teacher for teacher in teachers if not teacher.finished(receivers)]:
        # The one whose clock is furthest behind: nothing that it does can be earlier than what others have done
        # already.
        min(unfinished, key=lambda teacher: teacher.now).act(receivers)
    busy = [receiver.busy for receiver in receivers]
    for teacher in teachers:
        busy[teacher.rank] += teacher.busy
    sent = sum(line.bytes_sent for line in lines.values())
    ends = [teacher.now for teacher in teachers] + [receiver.done for receiver in receivers]
    return Simulation(plan, max(ends), tuple(busy), sent, sum(teacher.passes for teacher in teachers))


class _Teacher:
    """A teacher rank of a broadcast: its schedule, and what it has on its way to every other rank."""

    def __init__(self, rank: int, plan: Plan, costs: Costs, window: int, lines: dict[tuple[str, int], _Line]) -> None:
        self.rank, self.costs, self.window = rank, costs, window
        self.now, self.busy, self.passes = 0.0, 0.0, 0
        turns = Turns(plan.teacher_ranks)
        ranks = [peer for peer in range(plan.world_size) if peer == rank or plan.spans_of(peer)]
        network = costs.network
        self.edges: dict[int, _Edge] = {}
        for peer in ranks:
            if peer != rank:
                line = lines.setdefault(network.line(rank, peer), _Line(network.link(rank, peer)))
                self.edges[peer] = _Edge(line, window)
        self.ahead: list[float] = []  # batches for its own students, that wait for them since
        feeds = [Feed(peer, plan.spans_of(peer), Checks(), of=lambda a: turns.teacher_of(a) == rank) for peer in ranks]
        self.schedule = Schedule(feeds, home=rank)
        self.tick = max(
            IMPATIENCE_S, 0.02 * sum(costs.teacher_s)
        )  # finer than any patience with steps as long as these

    def finished(self, receivers: Sequence[_Receiver]) -> bool:
        return self.schedule.finished and receivers[self.rank].own.cursor is None

    def act(self, receivers: Sequence[_Receiver]) -> None:
        """Train what is there, or teach whoever is ready, or wait."""
        here = receivers[self.rank]
        slots = {peer: edge.ready_at(self.now) for peer, edge in self.edges.items()}
        if here.arrives_at <= self.now:
            # A teacher rank does one thing at a time: its students begin when it turns to them, not when their batch is
            # there.
            here.done = self.now
            here.train()
            self.now = here.done
            return
        ready = {peer for peer, at in slots.items() if at <= self.now}
        service = self.schedule.choose(ready | ({self.rank} if len(self.ahead) < self.window else set()), self.now)
        if service is not None:
            self._teach(service, receivers)
            return
        self.now = min([self.now + self.tick, *(at for at in (here.arrives_at, *slots.values()) if at > self.now)])

    def _teach(self, service: Service, receivers: Sequence[_Receiver]) -> None:
        costs = self.costs
        wanted = {peer: self.schedule.feeds[peer].boundaries_at(service.address) for peer in service.ranks}
        spent = _teacher_s(costs, self.rank, 0, max(map(max, wanted.values())))
        for peer in service.ranks:
            if peer != self.rank:
                size = sum(costs.boundary_bytes[boundary] for boundary in wanted[peer])
                spent += size * costs.network.link(self.rank, peer).sender_s_per_byte
                self.edges[peer].send(size, self.now + spent)
        self.now += spent
        self.busy += spent
        self.passes += 1
        self.schedule.served(service, self.now)
        if self.rank in service.ranks:
            self.ahead.append(self.now)
        for peer in service.ranks:
            receivers[peer].go_on()


class _Receiver:
    """The students of one rank of a broadcast, which take the batches of all teacher ranks in order."""

    def __init__(self, rank: int, plan: Plan, costs: Costs, teachers: Sequence[_Teacher]) -> None:
        self.rank, self.costs, self.teachers = rank, costs, teachers
        self.turns = Turns(plan.teacher_ranks)
        self.own = Feed(rank, plan.spans_of(rank), Checks())
        self.done, self.busy = 0.0, 0.0

    @property
    def arrives_at(self) -> float:
        """When the next batch is there; infinite while that is unknown, or none is needed."""
        if self.own.cursor is None:
            return math.inf
        teacher = self.teachers[self.turns.teacher_of(self.own.cursor)]
        if teacher.rank == self.rank:
            return teacher.ahead[0] if teacher.ahead else math.inf
        return teacher.edges[self.rank].arrives_at

    def go_on(self) -> None:
        """Train, on a rank that does nothing else, on all that is known to come."""
        while self.rank >= len(self.teachers) and self.arrives_at < math.inf:
            self.done = max(self.done, self.arrives_at)
            self.train()

    def train(self) -> None:
        """Train on the next batch, from `done` on."""
        address = self.own.cursor
        assert address is not None
        work = _students_s(self.costs, self.rank, self.own.units_at(address))
        self.done += work
        self.busy += work
        teacher = self.teachers[self.turns.teacher_of(address)]
        if teacher.rank == self.rank:
            teacher.ahead.pop(0)
        else:
            teacher.edges[self.rank].release(self.done)
        self.own.advance()


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
        deepest = max(everybody.boundaries_at(address)) - 1
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
                edges[target].send(size, begin + spent)
                # Known at once: each batch goes down the whole chain before the next is begun, so that all before it
                # are released.
                arrived = edges[target].arrived_at[-1]
            if feeds[rank].cursor == address:
                spent += _students_s(costs, rank, feeds[rank].units_at(address))
                feeds[rank].advance()
            busy[rank] += spent
            done[rank] = begin + spent
            if rank in edges:
                edges[rank].release(done[rank])
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
            steps = max(span.steps for span in plan.spans if span.input >= plan.starts[first])
            passed_on += costs.boundary_bytes[plan.starts[first]] * steps
    return Simulation(
        plan, single.makespan_s, tuple(busy), passed_on + gradient_bytes(plan, costs), single.teacher_passes
    )
