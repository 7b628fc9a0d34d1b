"""`python -m distill`: compose once, then start the ranks of the job; of several budgets a job each, as a sweep."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from distill.config.compose import compose
from distill.config.schema import SearchConfig
from distill.errors import DistillError
from distill.launch.launcher import launch
from distill.launch.multirun import multirun
from distill.launch.provenance import process_start


def main(arguments: Sequence[str]) -> int:
    """Run the job that the command line describes; return the exit status."""
    started_s = process_start()
    try:
        config = compose(arguments)
    except DistillError as error:
        sys.stderr.write(f"distill: {error}\n")
        return 2
    if config.search.budgets:
        return multirun([*arguments, *spread(config.search)])
    outcome = launch(config, command=shlex.join(["python", "-m", "distill", *arguments]), started_s=started_s)
    if outcome.stopped:
        sys.stderr.write("distill: stopped; the same command goes on where this run was\n")
    return outcome.status


def spread(search: SearchConfig) -> list[str]:
    """Return the overrides that make a sweep of several budgets: the candidates are scored by the first job."""
    assert search.sweep is not None
    values = [f"'{value}'" if isinstance(value, str) else str(value) for value in search.budgets]
    return [f"search.budget.{search.sweep.name}={','.join(values)}", "search.sweep=null", "search.budgets=[]"]
