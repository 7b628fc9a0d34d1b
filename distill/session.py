"""One rank's part of the distill stage, from a plan to blocks in the ledger: edges, stream, training loop, collection.

Takes plain arguments, so that tests and benchmarks run exactly what the job runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from distill.blocks import Chain
from distill.checkpoint import CheckpointFolder, block_name
from distill.completion import Collector, Deliverer
from distill.control import Control
from distill.data import Dataset
from distill.engine import distill
from distill.ledger import Entry, Ledger
from distill.plan import Plan, boundaries_of
from distill.protocol import Checks, Feed, Schedule
from distill.stream import RemoteStream, Stream, TeacherStream
from distill.trace import Trace
from distill.trainer import BlockTrainer, Reading
from distill.transport import BoundaryReceiver, BoundarySender, Edge, Wire


@dataclass(frozen=True)
class RankReport:
    """How one rank spent the stage, in seconds: on its own part, of that waiting for batches, and of CPU time."""

    seconds: float
    waited_s: float
    cpu_s: float


@dataclass(frozen=True)
class SessionReport:
    """The stage as rank 0 saw it. `makespan_s` ends when the last block is in the ledger."""

    makespan_s: float
    ranks: dict[int, RankReport]
    teacher_passes: int
    teacher_s: float
    bytes_sent: int

    def idle_share(self, rank: int) -> float:
        """Return the share of the makespan in which `rank` did not work; a rank without blocks was idle throughout."""
        report = self.ranks.get(rank)
        return 1.0 if report is None else 1 - (report.seconds - report.waited_s) / self.makespan_s


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all ranks of a distill stage have in common; run() is called once on each of them."""

    control: Control
    chain: Chain
    dataset: Dataset
    plan: Plan
    budget: int
    checks: Checks
    wire_dtype: torch.dtype
    wire_backend: str
    device: torch.device
    window: int
    timeout_s: float
    checkpoints: CheckpointFolder
    checkpoint_every: int
    report: Callable[[Reading], None]
    trace: Trace

    def lead(
        self, trainers: Sequence[BlockTrainer], ledger: Ledger, *, on_recorded: Callable[[Entry], None]
    ) -> SessionReport:
        """Rank 0: teach everybody, train `trainers`, collect all blocks; returns when the ledger has them all."""
        started, cpu_started = time.monotonic(), time.process_time()
        wake = threading.Event()

        def recorded(entry: Entry) -> None:
            self.checkpoints.remove(block_name(entry.block))
            on_recorded(entry)

        blocks = {span.block for span in self.plan.spans}
        collector = Collector(self.control, ledger, blocks=blocks, wake=wake, on_recorded=recorded, trace=self.trace)
        senders = {
            rank: self._sender(rank, wake) for rank in range(1, self.plan.world_size) if self.plan.spans_of(rank)
        }
        feeds = [Feed(rank, self.plan.spans_of(rank), self.checks) for rank in (0, *senders)]
        stream = TeacherStream(
            chain=self.chain,
            dataset=self.dataset,
            schedule=Schedule(feeds),
            senders=senders,
            wire_dtype=self.wire_dtype,
            finished_elsewhere=collector.finished_elsewhere,
            wake=wake,
            budget=self.budget,
            timeout_s=self.timeout_s,
            trace=self.trace,
        )
        self._train(stream, trainers, collector.deliver)
        own_s = time.monotonic() - started
        collector.wait()
        makespan_s = time.monotonic() - started
        reports = {0: RankReport(own_s, self.trace.seconds("wait"), time.process_time() - cpu_started)}
        for rank in senders:
            reports[rank] = RankReport(**self.control.wait(f"rank/{rank}", peer=rank, purpose="report"))
        bytes_sent = sum(sender.bytes_sent for sender in senders.values())
        return SessionReport(makespan_s, reports, stream.passes, self.trace.seconds("teacher"), bytes_sent)

    def follow(self, trainers: Sequence[BlockTrainer]) -> None:
        """Any other rank: train `trainers` on what arrives; returns when rank 0 has confirmed all of them. A rank
        without blocks returns at once."""
        if not trainers:
            return
        started, cpu_started = time.monotonic(), time.process_time()
        rank, store = self.control.rank, self.control.store_for("edges")
        receiver = BoundaryReceiver(
            self._edge(rank),
            store,
            self._wire(),
            boundaries={k: self.chain.boundaries[k] for k in boundaries_of(trainer.block for trainer in trainers)},
            num_boundaries=len(self.chain.boundaries),
            trace=self.trace,
        )
        deliverer = Deliverer(self.control, self.trace)
        self._train(RemoteStream(receiver, self.trace), trainers, deliverer.deliver)
        own_s = time.monotonic() - started
        deliverer.close()
        own = RankReport(own_s, self.trace.seconds("wait"), time.process_time() - cpu_started)
        self.control.set(f"rank/{rank}", asdict(own))

    def _train(self, stream: Stream, trainers: Sequence[BlockTrainer], deliver: Callable[[Entry, bytes], None]) -> None:
        distill(
            stream,
            trainers,
            rank=self.control.rank,
            generation=self.control.generation,
            checks=self.checks,
            checkpoints=self.checkpoints,
            checkpoint_every=self.checkpoint_every,
            deliver=deliver,
            report=self.report,
            trace=self.trace,
        )

    def _sender(self, rank: int, wake: threading.Event) -> BoundarySender:
        return BoundarySender(
            self._edge(rank),
            self.control.store_for("edges"),
            self._wire(),
            num_boundaries=len(self.chain.boundaries),
            window=self.window,
            on_free=wake.set,
            trace=self.trace,
        )

    def _edge(self, rank: int) -> Edge:
        return Edge(0, rank, self.control.generation, self.timeout_s)

    def _wire(self) -> Wire:
        return Wire(dtype=self.wire_dtype, device=self.device, backend=self.wire_backend)
