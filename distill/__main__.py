"""`report` draws pages. Else this process is one rank under torchrun; without it, it composes the job and launches."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """The console script `distill` and `python -m distill`; returns the exit status."""
    if sys.argv[1:2] == ["report"]:
        from distill.report.command import main as report

        return report(sys.argv[2:])
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from distill.job import run_rank

        return run_rank(sys.argv[1:])
    from distill.launcher import main as launch

    return launch(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
