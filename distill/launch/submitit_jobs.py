"""Jobs that Hydra's submitit launcher hands to Slurm: waiting for all of them, and cancelling them. Knows no sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class Waited:
    """A submitted job whose results() are at worst the error that would have been raised."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def results(self) -> list[Any]:
        try:
            return list(self._job.results())
        except Exception as error:  # submitit's own, or whatever the job raised
            return [error]


@contextmanager
def every_submitted_job(say: Callable[[str], None]) -> Iterator[None]:
    """Within, Hydra's submitit launcher waits for all its jobs, whatever becomes of one, and SystemExit cancels them.

    Left alone the launcher gives up on the first job that fails outside Python (cancelled, killed, out of memory), and
    leaves all running when it is told to stop. It keeps its jobs to itself, so they are taken from its executor.
    """
    submitit: Any = import_module("submitit")
    make_executor, submitted = submitit.AutoExecutor, list[Any]()

    def executor_that_remembers(**options: Any) -> Any:
        executor = make_executor(**options)
        submit = executor.map_array

        def map_array(*arguments: Any) -> list[Waited]:
            jobs = submit(*arguments)
            submitted.extend(jobs)
            say(f"sweep: submitted {', '.join(job.job_id for job in jobs)}; output in {jobs[0].paths.folder.parent}")
            return [Waited(job) for job in jobs]

        executor.map_array = map_array
        return executor

    submitit.AutoExecutor = executor_that_remembers
    try:
        yield
    except SystemExit:
        for job in submitted:
            job.cancel(check=False)
        raise
    finally:
        submitit.AutoExecutor = make_executor
