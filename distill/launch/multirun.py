"""`python -m distill --multirun`: launch the jobs of a sweep that are not finished, and tell what became of them all.

Hydra's launchers decide where a job runs; a job leaves its record in the sweep's folder, whoever launched it. Knows
nothing of ranks; needs no torch for jobs that are finished.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from distill.config.choices import Stage
from distill.config.command_line import SEARCH_PATH, key_of
from distill.config.compose import compose, register_schema
from distill.config.fingerprint import identity, run_directory
from distill.config.load import load
from distill.config.schema import JobConfig
from distill.errors import ConfigError, DistillError
from distill.launch.launcher import Outcome, launch
from distill.launch.signals import stoppable
from distill.launch.submitit_jobs import every_submitted_job
from distill.launch.sweep import Sweep, compose_master, hydra_ready, read_sweep
from distill.observability.numbers import show_count
from distill.reporting import comparison_table, console, write_comparison
from distill.storage.files import DamagedFileError, read_json, write_json
from distill.storage.run_directory import RunDirectory

FLAGS = ("-m", "--multirun", "hydra.mode=MULTIRUN")
RECORD = "job.json"  # in the job's folder within the sweep's
LONGEST_REASON = 400  # characters, for one line in a table


@dataclass
class Job:
    """One job of a sweep and what became of it: waiting, finished, skipped (finished before), failed or stopped."""

    number: int
    overrides: list[str]
    swept: list[str]
    run_dir: str | None = None
    status: str = "waiting"
    exit_status: int | None = None
    seconds: float = 0.0
    reason: str = ""


def multirun(arguments: Sequence[str]) -> int:
    """Run the sweep that the command line describes; return its exit status.

    0 where every job is finished, 1 where one failed, 2 where nothing could be started, 128 + N after signal N.
    """
    try:
        sweep = read_sweep([argument for argument in arguments if argument not in FLAGS])
        jobs = prepare(sweep)
        with stoppable(), hydra_ready() as ready:
            master = compose_master(ready, [f"hydra.sweep.dir=outputs/sweeps/{sweep.key}", *sweep.arguments])
            return _run(jobs, master, ready.config_loader())
    except DistillError as error:
        sys.stderr.write(f"distill: {error}\n")
        return 2


def prepare(sweep: Sweep) -> list[Job]:
    """Return the jobs with their run directories: waiting, skipped, or failed where they cannot be composed.

    Raises ConfigError where not one can be composed, and where two would share a run directory.
    """
    jobs, errors, seen = [], [], dict[tuple[Any, ...], Any]()
    own_choices = [override for override in sweep.launching if key_of(override) == SEARCH_PATH]
    for number, (overrides, swept) in enumerate(zip(sweep.jobs, sweep.swept, strict=True)):
        job = Job(number, overrides, swept)
        jobs.append(job)
        try:
            config = compose([*own_choices, *overrides])
            facts = identity(config, seen)
        except ConfigError as error:
            errors.append(error)
            job.status, job.exit_status, job.reason = "failed", 2, str(error)
            continue
        job.run_dir = str(run_directory(config, facts))
        if is_finished(config, facts):
            job.status, job.exit_status = "skipped", 0
    if len(errors) == len(jobs):
        raise errors[0]
    _refuse_shared(jobs)
    return jobs


def is_finished(config: JobConfig, facts: Mapping[str, Any]) -> bool:
    """Whether the run directory holds all that this configuration, of the identity `facts`, asks for."""
    run = RunDirectory(run_directory(config, facts))
    last = {Stage.all: "deliver", Stage.distill: "distill", Stage.teacher: "teacher"}.get(config.stage)
    try:
        if last is None or read_json(run.path / "identity.json") != facts:
            return False
    except DamagedFileError:
        return False  # the job tells of it
    return run.result(last) is not None and not any(run.damaged())


def _refuse_shared(jobs: Sequence[Job]) -> None:
    first: dict[str, Job] = {}
    for job in jobs:
        if job.run_dir is None:
            continue
        other = first.setdefault(job.run_dir, job)
        if other is not job:
            both = f"jobs {other.number} and {job.number} of the sweep ({_shown(other)}; {_shown(job)})"
            raise ConfigError("run.dir", job.run_dir, f"another folder for each of {both}: set run.tag=, or drop one")


def _run(jobs: Sequence[Job], master: DictConfig, loader: ConfigLoader) -> int:
    """Launch what is waiting, and write and tell what became of all, also when told to stop."""
    folder = Path(str(master.hydra.sweep.dir))
    due = [job for job in jobs if job.status == "waiting"]
    _say(f"sweep {folder}: {_counts(jobs)}")
    for job in jobs:
        if job.status == "failed":
            sys.stderr.write(f"distill: job {job.number} ({_shown(job)}): {job.reason}\n")
    # before the first job too: a sweep that is killed leaves word of what it was to run
    _write(folder, jobs)
    status, returned = 0, {}
    try:
        returned = _launch_all(due, folder, master, loader) if due else {}
    except SystemExit as stop:
        status = int(stop.code or 1)
    for job in due:
        _collect(job, returned.get(job.number), folder, stopped=status != 0)
    _write(folder, jobs)
    _tell(jobs, folder)
    if status:
        sys.stderr.write("distill: the sweep was stopped; the same command goes on where it was\n")
    return status or int(any(job.status == "failed" for job in jobs))


def _launch_all(due: Sequence[Job], folder: Path, master: DictConfig, loader: ConfigLoader) -> dict[int, Any]:
    """Let Hydra's launcher run the jobs and wait for them; return what it returns, by the jobs' numbers."""
    callbacks = Callbacks(master)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=loader, callbacks=callbacks), task_function=run_job, config=master
    )
    for job in due:
        # the record of an earlier attempt would be taken for this one's where this one leaves none
        _record_of(job, folder).unlink(missing_ok=True)
    submitting = type(launcher).__module__.startswith("hydra_plugins.hydra_submitit_launcher")
    callbacks.on_multirun_start(config=master, config_name="job")
    try:
        with every_submitted_job(_say) if submitting else nullcontext():
            each = [[*job.overrides, f"hydra.sweep.subdir={job.number}"] for job in due]
            results: list[Any] = list(launcher.launch(each, initial_job_idx=0))
    except Exception as error:  # whatever a launcher meets, the sweep's account is still given
        traceback.print_exc()
        results = [error] * len(due)
    callbacks.on_multirun_end(config=master, config_name="job")
    return {job.number: result for job, result in zip(due, results, strict=True)}


def run_job(cfg: DictConfig) -> dict[str, Any]:
    """Launch one job of a sweep, where Hydra's launcher wants it, and record what became of it.

    On Slurm every task of a job comes here and launches its node; the first keeps the record. Told to stop, raises
    SystemExit: a launcher that requeues jobs must not take that for a result.
    """
    register_schema()
    hydra = HydraConfig.get()
    _say(f"sweep: job {hydra.sweep.subdir}: {' '.join(hydra.overrides.task)}")
    start, run_dir = time.monotonic(), None
    try:
        config = load(cfg)
        run_dir = str(run_directory(config, identity(config)))
        _refuse_lonely_tasks(config)
        outcome = launch(config, command=shlex.join(["python", "-m", "distill", *hydra.overrides.task]))
    except DistillError as error:
        outcome = Outcome(2, str(error))
        sys.stderr.write(f"distill: {error}\n")
    except Exception as error:  # one job's failure, whatever it is, is not the sweep's
        outcome = Outcome(1, f"{type(error).__name__}: {error}")
        traceback.print_exc()
    record = {
        "run_dir": run_dir,
        "status": "stopped" if outcome.stopped else "failed" if outcome.status else "finished",
        "exit_status": outcome.status,
        "seconds": round(time.monotonic() - start, 3),
        "reason": " ".join(outcome.reason.split())[:LONGEST_REASON],
    }
    if os.environ.get("SLURM_PROCID", "0") == "0":
        write_json(Path(hydra.runtime.output_dir) / RECORD, record)
    if outcome.stopped:
        raise SystemExit(outcome.status)
    return record


def _refuse_lonely_tasks(config: JobConfig) -> None:
    """Refuse a Slurm step of several tasks that would each run the whole job, all in one run directory."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and tasks != config.launch.nnodes:
        allowed = f"{tasks}, as many as tasks of this Slurm step: add launch=slurm, with one task a node"
        raise ConfigError("launch.nnodes", config.launch.nnodes, allowed)


def _collect(job: Job, result: Any, folder: Path, *, stopped: bool) -> None:
    """Take over what a launched job recorded, or say why there is no record."""
    try:
        record = result.return_value if isinstance(result, JobReturn) else read_json(_record_of(job, folder))
    except DamagedFileError as damage:
        record, result = None, damage
    if record is not None:
        for name, value in record.items():
            setattr(job, name, value)
    elif stopped:
        job.status, job.reason = "stopped", "before it was started"
    else:
        job.status, job.exit_status = "failed", 1
        job.reason = " ".join(str(result).split())[:LONGEST_REASON]


def _tell(jobs: Sequence[Job], folder: Path) -> None:
    """Print every job with its fate; compare the runs."""
    _say(f"sweep {folder}: {_counts(jobs)}")
    for job in jobs:
        tail = f" (exit status {job.exit_status}: {job.reason})" if job.reason else ""
        place = f" {os.path.relpath(job.run_dir)}" if job.run_dir else ""
        _say(f"  {job.number:>3} {job.status:<9}{job.seconds:>8.1f} s  {_shown(job)}{place}{tail}")
    runs = [Path(job.run_dir) for job in jobs if job.run_dir]
    if any(run.is_dir() for run in runs):
        console().print(comparison_table(runs))
        _say(f"comparison: {write_comparison(runs, folder / 'comparison.html')}")


def _write(folder: Path, jobs: Sequence[Job]) -> None:
    write_json(folder / "sweep.json", {"jobs": [asdict(job) for job in jobs]})


def _record_of(job: Job, folder: Path) -> Path:
    return folder / str(job.number) / RECORD


def _shown(job: Job) -> str:
    return " ".join(job.swept or job.overrides)


def _counts(jobs: Sequence[Job]) -> str:
    found = Counter(job.status for job in jobs)
    return f"{show_count(len(jobs), 'job')}, " + ", ".join(f"{count} {status}" for status, count in found.items())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # the ranks write to the same place
