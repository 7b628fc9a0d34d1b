"""Memory of the ranks: what a plan may take, the plans that fit, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.blocks.chain import Chain
from distill.config.choices import OptimizerName, Stop
from distill.config.schema import JobConfig
from distill.cuda.lanes import NUM_LANES
from distill.errors import ConfigError
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.machine.host import available_memory
from distill.planning.costs import Costs, Span
from distill.planning.memory_model import Memory
from distill.planning.plan import Plan, Strategy, memory_of
from distill.planning.strategies.choice import DoesNotFitError, rank_plans
from distill.planning.unit import Unit
from distill.profiling.block_costs import Students, step_bytes
from distill.profiling.peak_memory import used_memory
from distill.training.graphed_teacher import MAX_GRAPHS

# Copies of a student's weights: the weights, their gradients, the last finite state, and what the optimizer keeps, also
# in that state.
COPIES = {OptimizerName.adam: 3 + 2 * 2, OptimizerName.sgd: 3 + 2 * 1, OptimizerName.rmsprop: 3 + 2 * 1}


def find_memory(
    context: Context,
    chain: Chain,
    students: Students,
    sample: Tensor,
    student_bytes: Sequence[int],
    *,
    peak_bytes: int | None,
) -> Memory:
    """Return what plans are to reckon with; every rank is taken to have what this one has now and may have. What of the
    peak while costs were measured (None: they were not) is more than expected, the allocator holds on to."""
    options = context.config.distill
    graphs = context.device.type == "cuda" and options.cuda_graphs
    memory = Memory(
        resident=used_memory(context.device),
        student=tuple(COPIES[options.optimizer] * size for size in student_bytes),
        step=step_bytes(chain, students, sample),
        boundary=tuple(boundary.nbytes for boundary in chain.boundaries),
        window=context.config.plan.window,
        ends=unit_ends(students, len(student_bytes)),
        limit=memory_limit(context),
        lanes=NUM_LANES if graphs else 0,
        # a graph for every set of blocks that still train: another one whenever a block has stopped early
        teacher_graphs=(MAX_GRAPHS if options.stop is Stop.plateau else 1) if graphs else 0,
    )
    held = 0 if peak_bytes is None else max(0, peak_bytes - memory.resident - memory.measuring)
    return replace(memory, held=held)


def unit_ends(units: Iterable[Unit], count: int) -> tuple[tuple[int, int], ...]:
    """Return the boundaries of the units by their numbers, up to `count`; where no unit has one, those of its block."""
    ends = {unit.number: (unit.input, unit.target) for unit in units}
    return tuple(ends.get(number, (number, number + 1)) for number in range(count))


def refuse_too_little(config: JobConfig, blocks: Blocks, device: torch.device) -> None:
    """Raise ConfigError where plan.memory_gib is too little for any plan, whatever its students need: that is known
    only when costs are, once the teacher is trained. Rank 0 calls this: its memory is taken for all."""
    wanted = config.plan.memory_gib
    if wanted is None:
        return
    boundary = tuple(boundary.nbytes for boundary in blocks.chain.boundaries)
    ends = unit_ends(blocks.units.values(), 1 + max(blocks.units))
    memory = Memory(used_memory(device), student=(), step=(), boundary=boundary, window=config.plan.window, ends=ends)
    needed = memory.least(blocks.units)
    if int(wanted * 2**30) < needed:
        raise ConfigError(
            "plan.memory_gib",
            wanted,
            f"more than {_gib(needed)}, which a rank has without any student: program, data, teacher and the "
            "activations of a batch; or take a smaller data.batch_size",
        )


def _gib(size: int) -> str:
    """GiB that are enough for so many bytes."""
    return f"{math.ceil(100 * size / 2**30) / 100:.2f}"


def memory_limit(context: Context) -> int:
    """Return the bytes that this rank may have: as asked for, its share of its GPU's, or of the host's spare ones."""
    num_local = context.control.local_world_size
    wanted = context.config.plan.memory_gib
    if wanted is not None:
        return int(wanted * 2**30)
    if context.device.type == "cuda":
        on_one = math.ceil(num_local / torch.cuda.device_count())  # ranks go round the GPUs
        return used_memory(context.device) + int(torch.cuda.mem_get_info(context.device)[0]) // on_one
    return used_memory(context.device) + available_memory() // num_local


def fitting_plans(context: Context, strategies: Sequence[Strategy], costs: Costs, spans: Sequence[Span]) -> list[Plan]:
    """Return the plans that fit, the fastest first. Raises ConfigError where none does."""
    try:
        return rank_plans(strategies, costs, spans, context.world_size)
    except DoesNotFitError as error:
        assert costs.memory is not None
        assert costs.memory.limit is not None
        raise ConfigError(
            "plan.memory_gib",
            context.config.plan.memory_gib,
            f"at least {_gib(error.bytes_needed)}, which the plan that needs the least "
            f"needs on one of its ranks (it may have {costs.memory.limit / 2**30:.3g} GiB); or take more ranks, "
            "smaller blocks or a smaller data.batch_size",
        ) from error


def show_memory(context: Context, plan: Plan, costs: Costs) -> None:
    """Print the most memory that every rank is predicted to need."""
    assert costs.memory is not None
    sizes = ", ".join(f"{size / 2**30:.2f}" for size in memory_of(plan, costs.memory))
    context.say(f"plan: predicted peak memory by rank: {sizes} GiB")
