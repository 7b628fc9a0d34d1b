"""One rank's part of the distill stage, from a plan to units in the ledger: edges, stream, training loop, collection.

Takes plain arguments, so that tests and benchmarks run exactly what the job runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from distill.engine.completion import Collector, Deliverer
from distill.engine.loop import Attempt, Outlets, distill
from distill.engine.news import News
from distill.engine.rebalance.handover import HandOver
from distill.engine.rebalance.moves import Headroom, Move
from distill.engine.rebalance.pace import PaceKeeper
from distill.engine.rebalance.stealing import say_headroom
from distill.engine.setting import Setting
from distill.engine.streams.broadcast import Stream
from distill.engine.streams.factory import Streams
from distill.planning.costs import Span
from distill.planning.plan import memory_of
from distill.profiling.peak_memory import PeakMemory
from distill.storage.checkpoint import CheckpointFolder, unit_name
from distill.storage.ledger import Entry, Ledger
from distill.training.trainer import BlockTrainer, Reading


@dataclass(frozen=True)
class RankReport:
    """How one rank spent the stage: seconds on its own part, of these waiting for batches and running the teacher, and
    of CPU time; batches that its stretch of the teacher computed, bytes of activations that it sent,
    and the most memory that it had."""

    seconds: float
    waited_s: float
    cpu_s: float
    teacher_s: float
    teacher_passes: int
    bytes_sent: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class SessionReport:
    """The stage as rank 0 saw it. `makespan_s` ends when the last unit is in the ledger; `take_overs` units went from
    one rank to another."""

    makespan_s: float
    ranks: dict[int, RankReport]
    take_overs: int = 0

    def idle_share(self, rank: int) -> float:
        """Return the share of the makespan in which `rank` did not work; a rank without units was idle throughout."""
        report = self.ranks.get(rank)
        return 1.0 if report is None else 1 - (report.seconds - report.waited_s) / self.makespan_s


@dataclass(frozen=True, kw_only=True)
class Session(Setting):
    """One rank's distill stage: lead() on rank 0, follow() on every other. `make` returns the trainer of any unit, at
    its last checkpoint."""

    make: Callable[[int], BlockTrainer]
    checkpoints: CheckpointFolder
    checkpoint_every: int
    report: Callable[[Reading], None]

    def lead(
        self,
        trainers: Sequence[BlockTrainer],
        ledger: Ledger,
        *,
        on_recorded: Callable[[Entry], None],
        on_moved: Callable[[Move], None],
    ) -> SessionReport:
        """Rank 0: do its part, collect all units; returns when the ledger has them all."""
        started = time.monotonic()
        wake = threading.Event()
        moves: list[Move] = []

        def recorded(entry: Entry) -> None:
            # only when the ledger has the unit: a crash between the two finds both, never neither
            self.checkpoints.remove(unit_name(entry.unit))
            on_recorded(entry)

        def moved(move: Move) -> None:
            moves.append(move)
            collector.moved(move.unit, move.target)
            on_moved(move)

        ranks = range(1, self.plan.world_size)
        collector = Collector(
            self.control,
            ledger,
            own=[span.unit for span in self.plan.spans_of(0)],
            elsewhere={span.unit: rank for rank in ranks for span in self.plan.spans_of(rank)},
            wake=wake,
            on_recorded=recorded,
            on_stolen=moved if self.steals else None,
            trace=self.trace,
        )
        # only now: no rank gives anything before it knows this, so no move is heard of while there is no `collector`
        if self.steals:
            say_headroom(self.control, self._headroom)
        reports = {
            0: self._work(
                trainers,
                collector.deliver,
                collector.finished_elsewhere,
                collector.complete,
                wake=wake,
                moved=moved,
            )
        }
        # the reports come after this: the makespan ends with the ledger, not when the last rank has said so
        collector.wait(all_fed=self.plan.how.fed_by_one(self.plan))
        makespan_s = time.monotonic() - started
        for rank in ranks:
            if self._takes_part(rank):
                reports[rank] = RankReport(**self.control.wait(f"rank/{rank}", peer=rank, purpose="report"))
        return SessionReport(makespan_s, reports, len(moves))

    def follow(self, trainers: Sequence[BlockTrainer]) -> None:
        """Any other rank: do its part; returns when rank 0 has confirmed all of its units. A rank that has nothing to
        do, and nothing to take over, returns at once."""
        if not self._takes_part(self.control.rank):
            return
        deliverer, news = Deliverer(self.control, self.trace), News(self.control, self.plan)
        deliver = deliverer.deliver if self._owns else lambda *_: None

        def all_announced() -> bool:
            news.finished_elsewhere()
            self.control.heed_leader()
            self.control.expect(0, purpose="end of the stage")
            return self.control.count("done") >= len(self.plan.spans)

        report = self._work(trainers, deliver, news.finished_elsewhere, all_announced, wake=threading.Event())
        deliverer.close()
        news.close()
        self.control.set(f"rank/{self.control.rank}", asdict(report))

    def _report(self, _: BlockTrainer, reading: Reading) -> None:
        self.report(reading)

    def _takes_part(self, rank: int) -> bool:
        return self.plan.has_work(rank) or self.steals

    @property
    def _headroom(self) -> Headroom | None:
        """What memory leaves to units that ranks take from one another."""
        return None if self.memory is None else Headroom.beside(self.memory, memory_of(self.plan, self.memory))

    @property
    def _owns(self) -> bool:
        """Whether the results of what this rank trains are its to report."""
        return self.plan.group_of(self.control.rank)[0] == self.control.rank

    def _work(
        self,
        trainers: Sequence[BlockTrainer],
        deliver: Callable[[Entry, bytes], None],
        finished_elsewhere: Callable[[], list[int]],
        all_done: Callable[[], bool],
        *,
        wake: threading.Event,
        moved: Callable[[Move], None] = lambda _: None,
    ) -> RankReport:
        """Train this rank's units, all at once or, in the strategies that are measured against, one after another;
        then what it can take over from others, until `all_done`."""
        started, cpu_started = time.monotonic(), time.process_time()
        memory = PeakMemory(self.device)
        hand_over = HandOver(self.control, make=self.make, trace=self.trace)
        streams = Streams(self, finished_elsewhere, wake, hand_over=hand_over, moved=moved)
        if len(self.plan.group_of(self.control.rank)) > 1:
            average = streams.averager()
            for trainer in trainers:
                trainer.share(average)
        report = PaceKeeper(self.control, self.report).note if self.moves_units or self.steals else self._report

        outlets = Outlets(
            deliver=deliver,
            save=self.checkpoints.save if self._owns else lambda _: None,
            checkpoint_every=self.checkpoint_every,
            report=report if self._owns else lambda *_: None,
            exchange=hand_over,
        )

        def train(stream: Stream, trainers: Sequence[BlockTrainer]) -> None:
            distill(
                stream,
                trainers,
                outlets,
                attempt=Attempt(self.control.rank, self.control.generation, started),
                checks=self.checks,
                trace=self.trace,
            )

        groups: list[Sequence[BlockTrainer]] = [[trainer] for trainer in trainers]
        if not self.plan.how.one_by_one:
            groups = [trainers] if self.plan.has_work(self.control.rank) else []
        for group in groups:
            train(streams.of([trainer.unit.number for trainer in group]), group)
        while moves := streams.stolen(all_done):
            taken = [trainer for trainer in map(hand_over.take, moves) if trainer is not None]
            if taken:
                train(streams.alone(Span.of(trainer.unit, trainer.step, trainer.budget) for trainer in taken), taken)
        hand_over.close()
        streams.close()
        return RankReport(
            seconds=time.monotonic() - started,
            waited_s=self.trace.seconds("wait"),
            cpu_s=time.process_time() - cpu_started,
            teacher_s=self.trace.seconds("teacher"),
            teacher_passes=streams.passes,
            bytes_sent=streams.bytes_sent,
            peak_memory_bytes=memory.read(),
        )
