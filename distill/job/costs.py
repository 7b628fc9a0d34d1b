"""What a plan is made for: seconds and FLOPs of every block and unit, sizes, the network, memory."""

from __future__ import annotations

import logging
import sys
from contextlib import closing
from dataclasses import asdict, dataclass

from distill.config.choices import Cost
from distill.data import Dataset
from distill.job.blocks import Blocks
from distill.job.cache import students_dtype
from distill.job.context import Context
from distill.job.memory import find_memory
from distill.job.network import find_network
from distill.job.reuse import TEACHER
from distill.job.trainers import Trainers, step_budget
from distill.planning.costs import Costs, Span
from distill.profiling.block_costs import (
    BlockCosts,
    average,
    calibrated,
    flop_costs,
    measured_costs,
    slowness,
    sustained_costs,
)  # fmt: skip
from distill.profiling.peak_memory import PeakMemory
from distill.profiling.sizes import Sizes, block_sizes
from distill.storage.ledger import Ledger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What rank 0 knows when it plans: the units' remaining steps and their costs, and what else is shown of them."""

    spans: list[Span]
    costs: Costs
    flops: BlockCosts
    sizes: tuple[Sizes, Sizes]
    measured: bool

    @property
    def seconds(self) -> BlockCosts:
        """Seconds of every block and unit, as they are shown and kept."""
        return BlockCosts(self.costs.teacher_s, self.costs.student_s)


def find_costs(context: Context, dataset: Dataset, blocks: Blocks, trainers: Trainers) -> Found | None:
    """Return what rank 0 is to plan with; None on other ranks. Every rank must call: with plan.cost=measured all
    measure at the same time, as they will train."""
    sample, students = dataset.train_batch(0).images, trainers.students
    flops = flop_costs(blocks.chain, students, sample) if context.leads else None
    peak, peak_bytes, measured = PeakMemory(context.device), None, None
    steps = step_budget(context.config, dataset)
    if context.config.plan.cost is Cost.measured and steps > 0:
        measured = _measure(context, dataset, blocks, trainers, steps=steps)
        peak_bytes = peak.read()
    network = find_network(context)
    if flops is None:
        return None
    seconds, speeds = measured or (calibrated(flops, blocks.chain, sample), ())
    ledger = Ledger(context.run.path, origin=context.run.origin(TEACHER))
    spans = [trainers.span(number) for number in blocks.units if number not in ledger.entries]
    student_bytes = tuple(map(trainers.student_bytes, range(len(seconds.student))))
    costs = Costs(
        seconds.teacher,
        seconds.student,
        tuple(boundary.numel * students_dtype(context.config).itemsize for boundary in blocks.chain.boundaries),
        student_bytes,
        speeds,
        network=network,
        batch_size=blocks.chain.boundaries[0].shape[0],
        memory=find_memory(context, blocks.chain, students, sample, student_bytes, peak_bytes=peak_bytes),
    )
    return Found(spans, costs, flops, block_sizes(blocks.chain, students, sample), measured is not None)


def _measure(
    context: Context, dataset: Dataset, blocks: Blocks, trainers: Trainers, *, steps: int
) -> tuple[BlockCosts, tuple[float, ...]] | None:
    """Return every block's mean seconds over the ranks and how slow each rank is, on rank 0; None elsewhere."""
    control = context.control
    control.set(f"measuring/{context.rank}", True)
    for peer in range(context.world_size):
        control.wait(f"measuring/{peer}", peer=peer, purpose="start of the measurement")
    if context.device.type == "cuda":
        with closing(dataset.train_batches(0, sys.maxsize)) as batches:
            own = sustained_costs(blocks.chain, trainers.students, lambda: next(batches).images)
    else:
        sample = dataset.train_batch(0).images
        ahead = control.local_rank / control.local_world_size
        own = measured_costs(blocks.chain, trainers.students, sample, steps=steps, ahead=ahead)
    control.set(f"costs/{context.rank}", asdict(own))
    if not context.leads:
        return None
    answers = [control.wait(f"costs/{peer}", peer=peer, purpose="costs") for peer in range(context.world_size)]
    found = [BlockCosts(tuple(costs["teacher"]), tuple(costs["student"])) for costs in answers]
    return average(found), slowness(found)
