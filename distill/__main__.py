"""`report` draws pages, `simulate` imagines clusters, `jobs` lists a sweep's jobs, `slurm` names the folder of batch
scripts. Else this process is one rank under torchrun; without it, it composes the job, or with --multirun the jobs of a
sweep, and launches."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.devices import Device
    from distill.plan import Costs, Span


# Both ends of every connection to the job's store look the other's name up for their logs. One lost answer of the name
# server keeps the store from serving anybody for as long as the resolver waits: five seconds, if not told otherwise.
RESOLVER = "timeout:1 attempts:4"


def main() -> int:
    """The console script `distill` and `python -m distill`; returns the exit status."""
    os.environ.setdefault("RES_OPTIONS", RESOLVER)
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error escapes what its encoding lacks; so should this
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    verb = _verb(arguments[0]) if arguments else None
    if verb:
        return verb(arguments[1:])
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from distill.job import run_rank

        return run_rank(arguments)
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments) and not {"-h", "--help"} & set(arguments):
        from distill.multirun import multirun

        return multirun(arguments)
    from distill.launcher import main as launch

    return launch(arguments)


def _verb(word: str) -> Callable[[Sequence[str]], int] | None:
    """What a first word that is no override asks for; its imports cost nobody else anything."""
    if word == "report":
        from distill.report.command import main as report

        return report
    if word == "simulate":
        from distill.forecast import main as simulate

        return partial(simulate, imagine=imagine)
    if word == "jobs":
        from distill.sweep import list_jobs

        return list_jobs
    if word == "slurm":
        from distill.shipped import main as slurm

        return slurm
    return None


def imagine(overrides: Sequence[str], device: Device, steps: int | None) -> tuple[Costs, list[Span]]:
    """Return the costs of a job on a described device. Only this needs torch, and a simulated run does not."""
    from distill.job.imagined import imagined_costs

    return imagined_costs(overrides, device, steps=steps)


if __name__ == "__main__":
    sys.exit(main())
