"""Starts the ranks of a composed job through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config.load import to_yaml
from distill.config.schema import JobConfig
from distill.launch.provenance import COMMAND_VARIABLE, STARTED_VARIABLE
from distill.launch.signals import Stop, Stopper, stoppable
from distill.machine.host import share_of_cores

if TYPE_CHECKING:  # importing torch takes seconds, which --help need not pay
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

CONFIG_VARIABLE = "DISTILL_RESOLVED"  # path of the composed configuration, for the ranks that this launcher starts


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit status, why it failed, and whether it was told to stop before its end."""

    status: int = 0
    reason: str = ""
    stopped: bool = False


def launch(config: JobConfig, *, command: str, started_s: float | None = None) -> Outcome:
    """Start this node's ranks, wait for them and return how the job ended. Told to stop, the ranks end first.

    `command` is what the user typed, for the record; it began at `started_s` (seconds of the epoch), by default now.
    """
    os.environ[COMMAND_VARIABLE] = command
    os.environ[STARTED_VARIABLE] = str(started_s or time.time())
    try:
        with stoppable() as stopper, tempfile.TemporaryDirectory(prefix="distill-") as scratch:
            return _launch(config, Path(scratch), stopper)
    except Stop as stop:
        return Outcome(stop.status, f"stopped by {stop.signal}", stopped=True)
    finally:
        os.environ.pop(CONFIG_VARIABLE, None)
        os.environ.pop(COMMAND_VARIABLE, None)
        os.environ.pop(STARTED_VARIABLE, None)


def _launch(config: JobConfig, scratch: Path, stopper: Stopper) -> Outcome:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    options = config.launch
    threads = options.threads_per_rank or share_of_cores(options.nproc_per_node)
    # torchrun would set this, its API does not: every rank would begin with threads for all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # One store for all attempts makes restarted ranks read the addresses of dead ones (pytorch#135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The ranks tell their own errors; the agent's account of them would only repeat that.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    resolved = scratch / "resolved.yaml"
    resolved.write_text(to_yaml(config), encoding="utf-8")
    os.environ[CONFIG_VARIABLE] = str(resolved)
    plan = LaunchConfig(
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        nproc_per_node=options.nproc_per_node,
        run_id=options.rdzv_id if options.nnodes > 1 else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=options.rdzv_endpoint or "localhost:0",
        rdzv_configs={} if options.rdzv_here is None else {"is_host": options.rdzv_here},
        local_addr=options.local_addr,
        max_restarts=options.max_restarts,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch)),
        signals_to_handle="SIGQUIT",  # the others are the stopper's: torch's handlers would outlive this job
    )
    stopper.check()
    try:
        elastic_launch(plan, sys.executable)("-u", "-m", "distill")
    except ChildFailedError as error:
        return _failed(error)
    finally:
        stopper.check()
    return Outcome()


def _failed(error: ChildFailedError) -> Outcome:
    """The outcome of the rank of this node that failed first, with its own words where it left some."""
    rank, failure = error.get_first_failure()
    told = failure.error_file_data.get("message")
    if isinstance(told, dict):
        reason = str(told["message"])
    else:
        reason = f"ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    return Outcome(abs(failure.exitcode), f"rank {rank}: {reason}")
