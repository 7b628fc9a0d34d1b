"""`report` draws pages, `simulate` imagines clusters, `bench` and `latency` time networks, `jobs` lists a sweep's jobs,
`slurm` names the folder of batch scripts. Else this process is one rank under torchrun; without it, it composes the
job, or with --multirun the jobs of a sweep, and launches."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.planning.costs import Costs, Span
    from distill.simulation.hardware import Device


# Both ends of every connection to the job's store look the other's name up for their logs. One lost answer of the name
# server keeps the store from serving anybody for as long as the resolver waits: five seconds, if not told otherwise.
RESOLVER = "timeout:1 attempts:4"


def main() -> int:
    """The console script `distill` and `python -m distill`; returns the exit status."""
    os.environ.setdefault("RES_OPTIONS", RESOLVER)
    is_rank = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    _end_quietly_on_ctrl_c(is_rank=is_rank)
    _open_streams()
    try:
        try:
            return _run(sys.argv[1:], is_rank=is_rank)
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        if not isinstance(end, BrokenPipeError) and not isinstance(end.__context__, BrokenPipeError):  # rich's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer has no reader
        return 128 + signal.SIGPIPE


def _run(arguments: Sequence[str], *, is_rank: bool) -> int:
    verb = _verb(arguments[0]) if arguments else None
    if verb:
        return verb(arguments[1:])
    if any(argument.startswith("-") for argument in arguments) and (told := _answer(arguments)) is not None:
        return told
    if is_rank:
        from distill.job import run_rank

        return run_rank(arguments)
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        from distill.launch.multirun import multirun

        return multirun(arguments)
    from distill.launch.command import main as launch

    return launch(arguments)


def _verb(word: str) -> Callable[[Sequence[str]], int] | None:
    """What a first word that is no override asks for; its imports cost nobody else anything."""
    if word == "report":
        from distill.reporting.command import main as verb
    elif word == "simulate":
        from distill.simulation.command import main as simulate

        return partial(simulate, imagine=imagine)
    elif word == "bench":
        from distill.deployment.bench import main as verb
    elif word == "latency":
        from distill.job.bundle import main as verb
    elif word == "jobs":
        from distill.launch.sweep import list_jobs as verb
    elif word == "slurm":
        from distill.config.shipped import main as verb
    else:
        return None
    return verb


def _answer(arguments: Sequence[str]) -> int | None:
    """Print what flags ask for; return the exit status, None where they do not ask."""
    from distill.errors import DistillError
    from distill.launch.answers import answer

    try:
        told = answer(arguments)
    except DistillError as error:
        sys.stderr.write(f"distill: {error}\n")
        return 2
    if told is not None and os.environ.get("RANK", "0") == "0":
        sys.stdout.write(told)
    return None if told is None else 0


def imagine(overrides: Sequence[str], device: Device, steps: int | None) -> tuple[Costs, list[Span]]:
    """Return the costs of a job on a described device. Only this needs torch, and a simulated run does not."""
    from distill.job.simulate import imagined_costs

    return imagined_costs(overrides, device, steps=steps)


def _end_quietly_on_ctrl_c(*, is_rank: bool) -> None:
    """Let Ctrl-C end this process at once and without a word, also amid an import, where an exception may be lost.

    While a job runs, distill/stopper.py ends it in order. A rank's launcher speaks for it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as behind nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL if is_rank else lambda number, _: os._exit(128 + number))


def _open_streams() -> None:
    """Make standard output and error able to take every text: whatever the locale lacks is escaped, and closed ones
    are replaced."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it is to stay open
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
