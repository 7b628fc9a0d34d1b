"""What comes to a rank under a plan and what it passes on: from a plan to the streams and edges of one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from distill.distributed.edges.receiver import BoundaryReceiver
from distill.distributed.edges.sender import BoundarySender
from distill.distributed.edges.wire import Wire
from distill.distributed.transport import Averager, Edge
from distill.engine.rebalance.assignments import Assignments, Balancer
from distill.engine.rebalance.handover import HandOver
from distill.engine.rebalance.moves import Headroom, Move
from distill.engine.rebalance.stealing import Giver, Taker
from distill.engine.setting import Setting
from distill.engine.streams.broadcast import RemoteStream, Stream, TeacherStream
from distill.engine.streams.cached import CachedStream
from distill.engine.streams.relay import Next, OwnBatches, Part, PassedOn, RelayStream
from distill.engine.streams.rows import overlaps, rows_of
from distill.engine.streams.teacher_turns import MergedStream, Merger, OwnTurns, TeacherInTurn
from distill.planning.costs import Span
from distill.planning.network import RING_SLOTS
from distill.planning.plan import Source
from distill.planning.schedule import Feed, Schedule, Turns
from distill.planning.unit import boundaries_of


class Streams:
    """Makes the streams of this rank, and counts what they computed and sent."""

    def __init__(
        self,
        setting: Setting,
        finished_elsewhere: Callable[[], list[int]],
        wake: threading.Event,
        *,
        hand_over: HandOver,
        moved: Callable[[Move], None],
    ) -> None:
        """On rank 0 `moved` hears of every block that goes from one rank to another."""
        self._setting, self._finished_elsewhere, self._wake = setting, finished_elsewhere, wake
        self._hand_over, self._moved = hand_over, moved
        self._rank = setting.control.rank
        self._wire = Wire(device=setting.device, backend=setting.wire_backend, shared_memory=setting.shared_memory)
        self._giver: Giver | None = None
        self._taker: Taker | None = None
        if setting.steals:
            self._giver, self._taker = self._stealing()
        self._senders: list[BoundarySender] = []
        self._teachers: list[TeacherStream | RelayStream] = []
        self._averagers: list[Averager] = []

    @property
    def passes(self) -> int:
        """Batches that this rank's stretch of the teacher has computed."""
        return sum(stream.passes for stream in self._teachers)

    @property
    def bytes_sent(self) -> int:
        return sum(sender.bytes_sent for sender in self._senders)

    def of(self, units: Sequence[int]) -> Stream:
        """Return the stream for these units of this rank."""
        openers = {Source.served: self._served, Source.stretch: self._relay, Source.recorded: self._cached}
        return openers[self._setting.plan.how.source](units)

    def _served(self, units: Sequence[int]) -> Stream:
        """A rank of a broadcast."""
        if self._setting.plan.teacher_ranks > 1:
            return self._merged()
        if self._rank == 0:
            return self._broadcast()
        return RemoteStream(
            self._setting.control,
            units=units,
            open_edge=lambda number, units: self._receiver(0, self._boundaries(units), number),
            trace=self._setting.trace,
        )

    def stolen(self, all_done: Callable[[], bool]) -> list[Move]:
        """Now that this rank has run dry, wait for blocks that it can take over; none where nobody has any to give, or
        where `all_done`, which is asked meanwhile and may raise."""
        if self._giver is not None:
            self._giver.close()
            self._giver = None
        if self._taker is None:
            return []
        with self._setting.trace.span("wait", "for blocks to take over"):
            return self._taker.wait(all_done)

    def alone(self, spans: Iterable[Span]) -> Stream:
        """Return the stream for blocks that have been taken over, from this rank's own pass through the teacher."""
        return self._stretch(Feed(self._rank, spans, self._setting.checks))

    def averager(self) -> Averager:
        """Return what averages gradients over the group of this rank, whose ranks must all ask for it."""
        setting = self._setting
        group = setting.plan.group_of(self._rank)
        averager = Averager(
            setting.control.store_for(f"average/{group[0]}"),
            rank=self._rank,
            group=group,
            share=len(self._rows) / setting.dataset.batch_size,
            timeout_s=setting.timeout_s,
            backend=setting.wire_backend,
        )
        self._averagers.append(averager)
        return averager

    def close(self) -> None:
        """Nothing is averaged any more."""
        for averager in self._averagers:
            averager.close()

    @property
    def _rows(self) -> range:
        """Which rows of every batch are this rank's."""
        group = self._setting.plan.group_of(self._rank)
        return rows_of(group.index(self._rank), len(group), self._setting.dataset.batch_size)

    def _boundaries(self, units: Collection[int]) -> frozenset[int]:
        return boundaries_of(span for span in self._setting.plan.spans if span.unit in units)

    def _cached(self, _: Sequence[int]) -> CachedStream:
        setting = self._setting
        assert setting.recorded is not None, "a cached plan needs what was recorded"
        feed = Feed(self._rank, setting.plan.spans_of(self._rank), setting.checks)
        return CachedStream(recorded=setting.recorded, feed=feed, trace=setting.trace)

    def _broadcast(self) -> TeacherStream:
        """The one teacher rank of a broadcast: the whole teacher, for everybody."""
        stream = TeacherStream(**self._teaching(Turns()))
        self._teachers.append(stream)
        return stream

    def _merged(self) -> Stream:
        """A rank of a broadcast with several teacher ranks, of which it may be one."""
        setting, plan, rank = self._setting, self._setting.plan, self._rank
        spans, turns = plan.spans_of(rank), Turns(plan.teacher_ranks)
        boundaries = boundaries_of(spans)
        others = [teacher for teacher in range(turns.teacher_ranks) if teacher != rank and spans]
        receivers = {teacher: self._receiver(teacher, boundaries) for teacher in others}
        own, own_turns = Feed(rank, spans, setting.checks), OwnTurns()
        if not plan.teaches(rank):
            return MergedStream(Merger(own, turns, receivers), setting.trace)
        stream = TeacherInTurn(
            merger=Merger(own, turns, receivers, own_turns),
            own_turns=own_turns,
            window=setting.window,
            **self._teaching(turns),
        )
        self._teachers.append(stream)
        return stream

    def _teaching(self, turns: Turns) -> dict[str, Any]:
        """What a teacher rank needs to serve everybody the batches of its turns."""
        setting, plan, rank = self._setting, self._setting.plan, self._rank
        trained = [peer for peer in range(plan.world_size) if plan.spans_of(peer)]
        feeds = [
            Feed(peer, plan.spans_of(peer), setting.checks, of=lambda address: turns.teacher_of(address) == rank)
            for peer in sorted({rank, *trained})
        ]
        schedule = Schedule(feeds, home=rank)
        # as much as an edge holds: the window at this end, the ring at the other
        backlog = setting.window + RING_SLOTS
        balancer = Balancer(
            control=setting.control,
            schedule=schedule,
            plan=plan,
            moves_units=setting.moves_units,
            headroom=Headroom.of(setting.memory, plan.owners, backlog=backlog),
            plateau=setting.checks.every > 0,
            teacher_s=self._pass_s,
        )
        return {
            "rank": rank,
            "chain": setting.chain,
            "dataset": setting.dataset,
            "schedule": schedule,
            "assignments": Assignments(
                control=setting.control,
                schedule=schedule,
                balancer=balancer,
                hand_over=self._hand_over,
                open_edge=self._sender,
                backlog=backlog,
                moved=self._moved,
            ),
            "wire_dtype": setting.wire_dtype,
            "finished_elsewhere": self._finished_elsewhere,
            "wake": self._wake,
            "budget": setting.budget,
            "every": turns.teacher_ranks,
            "timeout_s": setting.timeout_s,
            "trace": setting.trace,
        }

    def _relay(self, units: Sequence[int]) -> RelayStream:
        """A stretch of the teacher: all of it from the images, or in a relay this rank's own."""
        setting, plan, rank = self._setting, self._setting.plan, self._rank
        before, after = plan.group_before(rank), plan.group_after(rank)
        first = plan.starts[rank] if before else 0
        rows = self._rows
        own = Feed(rank, [span for span in plan.trained_by(rank) if span.unit in units], setting.checks)
        following = None
        if after:
            behind = plan.units_behind(rank)
            following = Next(
                Feed(after[0], [span for span in plan.spans if span.unit in behind], setting.checks),
                plan.starts[after[0]],
                tuple(
                    Part(
                        peer,
                        slice(shared.start - rows.start, shared.stop - rows.start),
                        self._sender(peer),
                    )
                    for peer, shared in overlaps(rows, after, setting.dataset.batch_size).items()
                ),
            )
        if before:
            parts = overlaps(rows, before, setting.dataset.batch_size)
            receivers = [self._receiver(peer, {first}, num_rows=len(shared)) for peer, shared in parts.items()]
            return self._stretch(own, following, PassedOn(receivers, first, setting.trace), first)
        return self._stretch(own, following)

    def _stretch(
        self, own: Feed, after: Next | None = None, passed_on: PassedOn | None = None, first: int = 0
    ) -> RelayStream:
        """A stretch of the teacher from boundary `first` on what is passed on, or from the images on."""
        setting, group = self._setting, self._setting.plan.group_of(self._rank)
        stream = RelayStream(
            chain=setting.chain,
            origin=passed_on
            or OwnBatches(
                setting.dataset,
                budget=setting.budget,
                own=own,
                after=after,
                part=group.index(self._rank),
                num_parts=len(group),
            ),
            first=first,
            own=own,
            after=after,
            giver=self._giver,
            taker=self._taker,
            finished_elsewhere=self._finished_elsewhere,
            rounded_to=setting.wire_dtype,
            wake=self._wake,
            timeout_s=setting.timeout_s,
            trace=setting.trace,
        )
        self._teachers.append(stream)
        return stream

    def _stealing(self) -> tuple[Giver, Taker | None]:
        setting = self._setting
        giver = Giver(setting.control, setting.plan, pass_s=self._pass_s, plateau=setting.checks.every > 0)
        alone = len(setting.plan.group_of(self._rank)) == 1
        return giver, Taker(setting.control, setting.plan, self._hand_over) if alone else None

    def _pass_s(self) -> float:
        """Seconds of a pass through this rank's stretch of the teacher so far."""
        return self._setting.trace.seconds("teacher") / max(1, self.passes)

    def _sender(self, target: int, number: int = 0, more: int = 0) -> BoundarySender:
        setting = self._setting
        sender = BoundarySender(
            Edge(self._rank, target, setting.control.generation, setting.timeout_s, f"boundaries{number}"),
            setting.control.store_for("edges"),
            self._wire,
            num_boundaries=len(setting.chain.boundaries),
            window=setting.window + more,
            on_free=self._wake.set,
            trace=setting.trace,
        )
        self._senders.append(sender)
        return sender

    def _receiver(
        self, source: int, boundaries: Collection[int], number: int = 0, *, num_rows: int | None = None
    ) -> BoundaryReceiver:
        """The end of an edge from `source`; of every batch `num_rows` come, or all."""
        setting = self._setting
        forms = {k: setting.chain.boundaries[k].of_rows(num_rows) for k in boundaries}
        if not setting.plan.how.passes_on:  # else it is what was computed
            forms = {k: replace(form, dtype=setting.wire_dtype) for k, form in forms.items()}
        return BoundaryReceiver(
            Edge(source, self._rank, setting.control.generation, setting.timeout_s, f"boundaries{number}"),
            setting.control.store_for("edges"),
            self._wire,
            boundaries=forms,
            num_boundaries=len(setting.chain.boundaries),
            trace=setting.trace,
            on_arrival=self._wake.set,
        )
