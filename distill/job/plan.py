"""The plan stage of the job: what is chosen, written and shown before blocks train."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.errors import ConfigError
from distill.job.blocks import Blocks
from distill.job.cache import Caching
from distill.job.context import Context
from distill.job.costs import Found, find_costs
from distill.job.memory import fitting_plans, show_memory
from distill.job.trainers import Trainers
from distill.planning.memory_model import Memory
from distill.planning.plan import STRATEGIES, Plan, memory_of
from distill.reporting import plan_table
from distill.storage.files import write_json

log = logging.getLogger(__name__)


def make_plan(
    context: Context,
    dataset: Dataset,
    blocks: Blocks,
    trainers: Trainers,
    caching: Caching | None,
    *,
    start: Mapping[int, float],
) -> tuple[Plan, Memory | None]:
    """Return the plan, the same on every rank: rank 0 makes it for the units that its ledger lacks; and on rank 0 the
    memory that the plan keeps to. `start` are the errors of first weights by unit, to be shown."""
    found = find_costs(context, dataset, blocks, trainers)
    if found is not None:
        plan = _chosen(context, found, blocks, caching)
        if found.measured and caching is None:
            plan = plan.started_in(dataset.measure_start())
        write_json(context.run.path / "plan.json", asdict(plan))
        write_json(context.run.path / "costs.json", _as_json(blocks, found, plan))
        _show(context, blocks, plan, found, start)
        show_memory(context, plan, found.costs)
        context.control.set("plan", plan.to_json())
    memory = found.costs.memory if found else None
    return Plan.from_json(context.control.wait("plan", peer=0, purpose="plan")), memory


def _chosen(context: Context, found: Found, blocks: Blocks, caching: Caching | None) -> Plan:
    """Return the plan to carry out: the best of the strategies asked for, or the one that reads what is recorded."""
    divisible = blocks.chain.divisible
    asked = [strategy for strategy in context.config.plan.strategies if divisible or not strategy.divides]
    plans = fitting_plans(context, asked, found.costs, found.spans)
    _show_ranking(context, plans)
    if caching is None:
        return plans[0]
    (plan,) = fitting_plans(context, [STRATEGIES["cached"]], caching.price(found.costs, found.spans), found.spans)
    caching.tell(plan, without=plans[0])
    return plan


def refuse_impossible(config: JobConfig, blocks: Blocks, *, world_size: int) -> None:
    """Raise ConfigError where that many ranks cannot run the asked plan on this network."""
    teacher_ranks = config.plan.teacher_ranks
    if teacher_ranks is not None and teacher_ranks > world_size:
        raise ConfigError("plan.teacher_ranks", teacher_ranks, f"at most the number of ranks, {world_size}")
    if not blocks.chain.divisible and all(strategy.divides for strategy in config.plan.strategies):
        allowed = "another strategy: this network is run through hooks, not block by block"
        raise ConfigError("plan.strategy", config.plan.strategy.name, allowed)


def _show_ranking(context: Context, plans: Sequence[Plan]) -> None:
    if len(plans) > 1:
        ranking = ", ".join(f"{plan.label} {plan.predicted_makespan_s:.1f} s" for plan in plans)
        context.say(f"plan: predicted makespans: {ranking}")


def _as_json(blocks: Blocks, found: Found, plan: Plan) -> dict[str, Any]:
    """Return what `distill simulate` and the report need to know of the costs."""
    costs = found.costs
    return {
        "blocks": [block.name for block in blocks.chain.blocks],
        "units": [asdict(unit) for unit in blocks.units.values()],
        "seconds": asdict(found.seconds),
        "flops": asdict(found.flops),
        "boundary_bytes": costs.boundary_bytes,
        "student_bytes": costs.student_bytes,
        "slowness": costs.slowness,
        "memory": asdict(costs.memory) if costs.memory else None,
        "peak_memory_bytes": memory_of(plan, costs.memory) if costs.memory else [],
        "network": {
            "within": costs.network.within.facts(),
            "between": costs.network.between.facts(),
            "hosts": costs.network.hosts,
        },
    }


def _show(context: Context, blocks: Blocks, plan: Plan, found: Found, start: Mapping[int, float]) -> None:
    """Print the plan."""
    names, units = [block.name for block in blocks.chain.blocks], blocks.units.values()
    context.console.print(plan_table(plan, names, units, sizes=found.sizes, costs=found.seconds, start=start))
    for rank, predicted in enumerate(plan.predicted_rank_s):
        context.say(f"rank {rank}: {_role(plan, rank)}, predicted {predicted:.1f} s")
    within = f" (within {100 * plan.gap:.2g} % of the optimum)" if plan.gap else ""
    context.say(f"plan: {plan.label}, predicted makespan {plan.predicted_makespan_s:.1f} s{within}")
    if plan.start_s:
        context.say(f"plan: of that {plan.start_s:.1f} s until images are decoded: processes that do it have to start")
    idle = [str(rank) for rank in range(1, plan.world_size) if not plan.has_work(rank)]
    if idle and plan.spans:
        log.warning("plan: more ranks than blocks to train: ranks %s stay idle", ", ".join(idle))


def _role(plan: Plan, rank: int) -> str:
    """What a rank does."""
    parts = ["teacher"] * plan.teaches(rank) + ["students"] * bool(plan.trained_by(rank))
    others = ", ".join(str(peer) for peer in plan.group_of(rank) if peer != rank)
    return (" and ".join(parts) or "idle") + (f" with rank{'s' * (',' in others)} {others}" if others else "")
