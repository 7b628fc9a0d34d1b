"""Under torchrun this process is one rank. Otherwise it composes the job and launches the ranks."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """The console script `distill` and `python -m distill`; returns the exit status."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from distill.job import run_rank

        return run_rank(sys.argv[1:])
    arguments = sys.argv[1:]
    if arguments[:1] == ["jobs"]:
        from distill.sweep import list_jobs

        return list_jobs(arguments[1:])
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments) and not {"-h", "--help"} & set(arguments):
        from distill.multirun import multirun

        return multirun(arguments)
    from distill.launcher import main as launch

    return launch(arguments)


if __name__ == "__main__":
    sys.exit(main())
