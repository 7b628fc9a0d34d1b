"""One rank from its environment to its exit status: agree on the configuration, run the stages, tell errors once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.config.choices import Device, Stage
from distill.config.fingerprint import identity, run_directory
from distill.config.load import from_yaml, to_yaml
from distill.config.outside import make_importable
from distill.config.schema import JobConfig
from distill.cuda.clock import DeviceClock
from distill.data import Dataset
from distill.distributed.roll_call import call_roll
from distill.distributed.store import Control, LeaderFailedError, StoreAddress, ranks_of
from distill.errors import ConfigError, DistillError
from distill.job.assemble import assemble_student
from distill.job.blocks import Blocks, cut_blocks
from distill.job.cache import is_cached, refuse_too_large, tell_unused
from distill.job.context import Context
from distill.job.data import open_data
from distill.job.deliver import deliver, refuse_unfinished
from distill.job.distill import train_blocks
from distill.job.energy import metering
from distill.job.evaluate import evaluate, refuse_unjudged, warn_of_few_images
from distill.job.failure import MOURNING_S, leave_word, let_peers_know, tell
from distill.job.finetune import finetune_student, refuse_ranks_without_rows
from distill.job.first_weights import STAGE as FIRST_WEIGHTS
from distill.job.kept_logits import refuse_unkept
from distill.job.latency import runtime_of_job
from distill.job.logs import HeldBack, log_to
from distill.job.memory import refuse_too_little
from distill.job.outside import refuse_unusable_block_loss, refuse_unusable_objective
from distill.job.plan import refuse_impossible
from distill.job.pool import Pool, find_pool
from distill.job.refine import refine_student, refuse_unrefinable
from distill.job.search import STAGE as SEARCH
from distill.job.search import choose_students, found_students
from distill.job.streams import with_chosen_streams
from distill.job.teacher import build_teacher, train_teacher
from distill.job.time_budget import with_block_steps
from distill.launch.launcher import CONFIG_VARIABLE
from distill.launch.provenance import command_start
from distill.machine.host import share_of_cores
from distill.observability.tensorboard import Scalars
from distill.observability.trace import Trace
from distill.reporting import console
from distill.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

EXCHANGE_S = 600.0  # for the exchange of the configuration, before its own time limits are known


def run_rank(overrides: Sequence[str]) -> int:
    """Run this process's part of the job; return the exit status (0, or 1 after an error that has been told)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the launcher speaks for all ranks
    started_s = command_start()
    rank, world_size, local_rank, local_world_size = ranks_of(os.environ)
    address = StoreAddress(rank=rank, world_size=world_size, environment=os.environ, timeout_s=EXCHANGE_S)
    control = Control(
        address,
        rank=rank,
        world_size=world_size,
        timeout_s=EXCHANGE_S,
        local_rank=local_rank,
        local_world_size=local_world_size,
    )
    with ExitStack() as ending:
        return _run_and_tell(control, overrides, ending, started_s)


def run_alone(config: JobConfig) -> Path:
    """Run a job as its only rank, within a process that goes on afterwards; return its run directory.

    Raises DistillError. What is logged goes to the console and the run directory while it lasts; the number of threads
    is the caller's again at the end.
    """
    address = StoreAddress(rank=0, world_size=1, environment={}, timeout_s=EXCHANGE_S)
    control = Control(address, rank=0, world_size=1, timeout_s=config.plan.timeout_s)
    logger, threads = logging.getLogger("distill"), torch.get_num_threads()
    before = (logger.level, logger.propagate, list(logger.handlers))
    held = HeldBack()
    with ExitStack() as ending:
        try:
            return _run(config, control, ending, held, time.time())
        finally:
            held.hand_on()
            for handler in set(logger.handlers) - set(before[2]):
                handler.close()
            logger.level, logger.propagate, logger.handlers = before
            torch.set_num_threads(threads)


def _run_and_tell(control: Control, overrides: Sequence[str], ending: ExitStack, started_s: float) -> int:
    """Run this process's part of the job; `ending` is what is left to do after all ranks have left."""
    rank, held = control.rank, HeldBack()
    try:
        config = _agree_on_config(control, overrides)
        control.timeout_s = config.plan.timeout_s
        _run(config, control, ending, held, started_s)
    except DistillError as error:
        held.hand_on()
        if isinstance(error, LeaderFailedError) and rank != 0:
            time.sleep(MOURNING_S)  # rank 0 ends the job with its own words; if it cannot, these are told after all
        leave_word(str(error))
        tell(error, control)
        return 1
    except Exception as error:
        held.hand_on()
        leave_word(f"{type(error).__name__}: {error}")
        log.exception("rank %d failed", rank)
        sys.stderr.write(f"distill: rank {rank}: {type(error).__name__}: {error}\n")  # one line to look for
        if rank == 0:
            let_peers_know(control)
        raise
    control.leave()
    return 0


def _agree_on_config(control: Control, overrides: Sequence[str]) -> JobConfig:
    """Rank 0 composes (or reads what the launcher composed) and everybody else takes that: one answer to ${now:}."""
    if control.rank == 0:
        path = os.environ.get(CONFIG_VARIABLE)
        config = from_yaml(Path(path).read_text(encoding="utf-8")) if path else _composed(overrides)
        control.set("config", to_yaml(config))
        return config
    text = control.wait("config", peer=0, purpose="configuration")
    return from_yaml(text)


def _composed(overrides: Sequence[str]) -> JobConfig:
    from distill.config.compose import compose  # here: importing Hydra takes half a second, which the launcher has paid

    return compose(overrides)


def _run(config: JobConfig, control: Control, ending: ExitStack, held: HeldBack, started_s: float) -> Path:
    """Run the stages that the configuration asks for; return the run directory."""
    make_importable(config.run.code)
    if config.search.budgets:
        allowed = (
            "none in one job: python -m distill alone makes a job of each, as --multirun search.budget.NAME=A,B does"
        )
        raise ConfigError("search.budgets", config.search.budgets, allowed)
    device = _device(config, control.local_rank)
    torch.set_num_threads(config.launch.threads_per_rank or share_of_cores(control.local_world_size))
    facts, run = _agree_on_identity(config, control)
    # when all ranks have left, not at the end of this one's part: until then others may write there
    ending.callback(run.release)
    if config.stage is Stage.deliver:
        refuse_unfinished(config, facts, run)
    refuse_ranks_without_rows(config, world_size=control.world_size)
    if control.rank == 0 and config.stage in (Stage.all, Stage.deliver):
        runtime_of_job(config)  # refuses what cannot be measured here before anything is trained
    with open_data(config, device, ranks_here=control.local_world_size) as dataset:
        if control.rank == 0 and config.stage is Stage.all:
            refuse_unjudged(config, dataset)
        refuse_unkept(config, dataset, ranks_here=control.local_world_size)
        teacher = build_teacher(config, dataset, device)
        pool, blocks = _students(config, dataset, teacher, device, run)
        if blocks is not None and run.result("distill") is None:
            refuse_impossible(config, blocks, world_size=control.world_size)
            refuse_unusable_block_loss(config, blocks, device)
            refuse_unusable_objective(config, teacher, dataset.image_shape)
            refuse_unrefinable(config, blocks, world_size=control.world_size)
            if control.rank == 0:
                refuse_too_little(config, blocks, device)
            if is_cached(config):
                refuse_too_large(config, dataset, blocks)
        # only now is anything written: the job can run
        context = _claim(config, control, device, facts, run, started_s=started_s)
        held.hand_on()
        context.say(f"run directory: {context.run.path} (attempt {control.generation})")
        for damage in run.mended:
            log.warning("%s", damage)
        with context.recording(), metering(control, context.run.path, context.roll_call) as meters:
            context = replace(context, watchers=(context.trace.stage, *meters))
            tell_unused(context)
            if context.leads and config.stage is Stage.all:
                warn_of_few_images(config, dataset)
            train_teacher(context, dataset, teacher)
            if blocks is None:
                context.say(f"teacher: {context.run.path / 'teacher.safetensors'}")
            else:
                if config.search.on:
                    blocks = _searched(context, dataset, teacher, pool, blocks)
                _distill(context, dataset, teacher, blocks)
    return run.path


def _students(
    config: JobConfig, dataset: Dataset, teacher: nn.Module, device: torch.device, run: RunDirectory
) -> tuple[Pool | None, Blocks | None]:
    """Return the students of blocks as far as the configuration asks for them; where they are yet to be chosen, what
    they are chosen from and an example of them."""
    if config.stage is Stage.teacher:
        return None, None
    if not config.search.on:
        return None, cut_blocks(config, dataset.image_shape, teacher, device)
    result = run.result(SEARCH)
    if result is not None:
        return None, found_students(config, dataset.image_shape, teacher, device, result)
    pool = find_pool(config, dataset.image_shape, teacher, device)
    return pool, pool.example


def _searched(context: Context, dataset: Dataset, teacher: nn.Module, pool: Pool | None, blocks: Blocks) -> Blocks:
    """Return the students that are chosen under budgets: `blocks`, where an earlier attempt has chosen them."""
    if context.leads and context.config.search.steps > 0 and context.run.result(FIRST_WEIGHTS) is None:
        context.run.reopen(SEARCH)  # which alone makes first weights that were trained
    result = context.completed(SEARCH)
    if result is not None:
        found = ", ".join(f"{block} {label}" for block, label in result["chosen"].items())
        context.say(f"search: complete since an earlier attempt ({found})")
        return blocks
    if pool is None:  # the record was damaged
        pool = find_pool(context.config, dataset.image_shape, teacher, context.device)
    return choose_students(context, dataset, teacher, pool)


def _distill(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> None:
    """Run the stages from the plan on, as far as the configuration asks for."""
    for remark in blocks.remarks:
        context.say(remark)
    if not context.config.search.on:  # which has chosen them before it scored the blocks that have them
        blocks = with_chosen_streams(context, dataset, teacher, blocks)
    context = with_block_steps(context, dataset, teacher, blocks)
    train_blocks(context, dataset, teacher, blocks)
    if context.config.stage not in (Stage.all, Stage.deliver):
        return
    with context.during("assemble"):
        students = assemble_student(context, dataset, teacher, blocks)
    students += refine_student(context, dataset, teacher, blocks)
    with context.during("finetune"):
        start = "refined" if "refined" in students else "recalibrated"
        students += finetune_student(context, dataset, teacher, blocks, start=start)
    with context.during("evaluate"):
        evaluate(context, dataset, teacher, blocks, students)
    with context.during("deliver"):
        deliver(context, dataset, teacher, blocks)


def _agree_on_identity(config: JobConfig, control: Control) -> tuple[dict[str, Any], RunDirectory]:
    """Rank 0 reads what decides the results by its content; everybody learns that and the place of the results."""
    if control.rank == 0:
        facts = identity(config)
        control.set("identity", {"facts": facts, "dir": str(run_directory(config, facts))})
    found = control.wait("identity", peer=0, purpose="identity of the job")
    return found["facts"], RunDirectory(Path(found["dir"]))


def _claim(
    config: JobConfig,
    control: Control,
    device: torch.device,
    facts: dict[str, Any],
    run: RunDirectory,
    *,
    started_s: float,
) -> Context:
    """Rank 0 takes the run directory; everybody learns this attempt's generation."""
    if control.rank == 0:
        control.set("generation", run.claim(facts, to_yaml(config)))
    # set last: keys lie under the generation, and this one was said under the one before
    control.generation = control.wait("generation", peer=0, purpose="run directory")
    clock = DeviceClock(device) if device.type == "cuda" else None
    trace = Trace(control.rank, control.generation, device_clock=clock)
    scalars = Scalars(run.path / "tensorboard" / f"rank{control.rank}")
    roll_call = call_roll(control, device)
    context = Context(config, control, run, device, roll_call, console(), trace, scalars, facts, started_s)
    log_to(context)
    return context


def _device(config: JobConfig, local_rank: int) -> torch.device:
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "cpu or auto: PyTorch finds no CUDA device here")
    if config.device is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
