"""The distill stage of the job: plan, run the session with its display and readings, record the result."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import nn

from distill.config.choices import Stage, Stop
from distill.data import Dataset
from distill.engine.rebalance.moves import Move
from distill.engine.session import Session, SessionReport
from distill.job.blocks import Blocks
from distill.job.cache import Caching, is_cached, students_dtype
from distill.job.context import Context
from distill.job.first_weights import find_first_weights, first_file
from distill.job.metrics import Readings, latest_readings
from distill.job.plan import make_plan
from distill.job.reuse import TEACHER, take_units, unit_identities
from distill.job.trainers import Trainers, step_budget
from distill.observability.display import Display, UnitLine
from distill.planning.plan import Plan
from distill.planning.schedule import Checks
from distill.storage.checkpoint import CheckpointFolder
from distill.storage.ledger import Entry, Ledger


def train_blocks(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> None:
    """Run the distill stage to its end (or up to the printed plan); blocks in the ledger are not trained again."""
    config = context.config
    dataset = dataset.with_views(config.distill.views)
    budget = step_budget(config, dataset)
    if context.leads and config.stage is not Stage.plan and context.run.result("distill") is None:
        _take_blocks(context, teacher, blocks, budget=budget)
    # Also where all blocks are taken from another run: assembling lets no block end worse than it began.
    with context.during("first_weights"):
        start = find_first_weights(context, dataset, teacher, blocks)
    if (result := context.completed("distill")) is not None:
        source = result.get("taken_from")
        since = f"its figures are those of run {source}" if source else "complete since an earlier attempt"
        context.say(f"distill stage: {since}; no block is trained again")
        return
    plateau = config.distill.stop is Stop.plateau
    checks = Checks(config.distill.check_every, config.distill.check_batches) if plateau else Checks()
    caching = Caching(context, dataset, teacher, blocks) if is_cached(config) else None
    origin = context.run.origin(TEACHER)
    checkpoints = CheckpointFolder(context.run.path, generation=context.control.generation, origin=origin)
    makers = Trainers(context, blocks, checkpoints, budget=budget, start=start)
    with context.during("plan"):
        plan, memory = make_plan(context, dataset, blocks, makers, caching, start=start)
    if config.stage is Stage.plan:
        return
    recorded = caching.record(plan) if caching is not None else None
    with (
        closing(Readings(context, {number: unit.name for number, unit in blocks.units.items()})) as readings,
        context.during("distill"),
    ):
        session = Session(
            control=context.control,
            chain=blocks.chain,
            dataset=dataset,
            plan=plan,
            budget=budget,
            checks=checks,
            wire_dtype=students_dtype(config),
            wire_backend=context.roll_call.wire_backend,
            shared_memory=config.plan.shared_memory,
            take_over=config.plan.take_over,
            device=context.device,
            window=config.plan.window,
            timeout_s=config.plan.timeout_s,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint.every,
            report=readings.add,
            make=makers.resumed,
            trace=context.trace,
            memory=memory,
            recorded=recorded,
        )
        trainers = [makers.resumed(span.unit) for span in plan.trained_by(context.rank)]
        if context.leads:
            _lead(context, session, blocks, trainers, caching)
        else:
            session.follow(trainers)


def _take_blocks(context: Context, teacher: nn.Module, blocks: Blocks, *, budget: int) -> None:
    search, trained = context.config.search, {}
    if search.on and search.steps > 0:
        files = {number: first_file(number) for number in blocks.units}
        trained = {number: context.run.digests([file])[file] for number, file in files.items()}
    identities = unit_identities(context.identity, blocks=blocks, teacher=teacher, budget=budget, trained=trained)
    take_units(context, identities, {number: unit.name for number, unit in blocks.units.items()})


def _lead(context: Context, session: Session, blocks: Blocks, trainers: list[Any], caching: Caching | None) -> None:
    plan, ledger = session.plan, Ledger(context.run.path, origin=context.run.origin(TEACHER))
    with _display(context, blocks, plan, batch_size=session.dataset.batch_size) as display:

        def recorded(entry: Entry) -> None:
            error = entry.rel_error_last
            display.finish(entry.unit, status=entry.status, step=entry.steps, rank=entry.rank, relative_error=error)

        def moved(move: Move) -> None:
            display.move(move.unit, move.target, step=move.step)

        report = session.lead(trainers, ledger, on_recorded=recorded, on_moved=moved)
    steps = max((ledger.entries[span.unit].steps - span.first for span in plan.spans), default=0)
    resumed = any(span.first > 0 for span in plan.spans) or len(plan.spans) < len(blocks.units)
    images = steps * session.dataset.batch_size
    cache = caching.result(plan) if caching is not None else None
    result = _result(plan, report, images=images, resumed=resumed, cache=cache)
    context.run.complete("distill", result, made=ledger.files, used=[TEACHER])
    if caching is not None:
        caching.remove()
    speed = f", {images / report.makespan_s:.0f} images/s" if images else ""
    context.say(f"distill stage: {report.makespan_s:.1f} s, predicted {plan.predicted_makespan_s:.1f} s{speed}")


def _result(
    plan: Plan, report: SessionReport, *, images: int, resumed: bool, cache: dict[str, Any] | None
) -> dict[str, Any]:
    """The distill section of metrics.json. A resumed run counts only what its last attempt did."""
    recorded = {"cache": cache} if cache is not None else {}
    return recorded | {
        "strategy": plan.strategy,
        "groups": plan.groups,
        "teaching_ranks": [rank for rank in range(plan.world_size) if plan.teaches(rank)],
        "world_size": plan.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "resumed": resumed,
        "seconds": report.makespan_s,
        "makespan_predicted_s": plan.predicted_makespan_s,
        "images_per_second": images / report.makespan_s if images else None,
        "teacher_passes": sum(rank.teacher_passes for rank in report.ranks.values())
        + (cache or {}).get("teacher_passes", 0),
        "teacher_seconds": sum(rank.teacher_s for rank in report.ranks.values()),
        "take_overs": report.take_overs,
        "bytes_sent": sum(rank.bytes_sent for rank in report.ranks.values()),
        "idle_share": [report.idle_share(rank) for rank in range(plan.world_size)],
        "cpu_seconds": sum(rank.cpu_s for rank in report.ranks.values()),
        "peak_memory_bytes": [
            report.ranks[rank].peak_memory_bytes if rank in report.ranks else None for rank in range(plan.world_size)
        ],
    }


def _display(context: Context, blocks: Blocks, plan: Plan, *, batch_size: int) -> Display:
    control = context.control.second()
    lines = [
        UnitLine(span.unit, blocks.units[span.unit].name, rank, span.budget, step=span.first)
        for rank in range(plan.world_size)
        for span in plan.spans_of(rank)
    ]

    lines.sort(key=lambda line: line.unit)
    return Display(lines, batch_size=batch_size, poll=lambda: latest_readings(control), console=context.console)
