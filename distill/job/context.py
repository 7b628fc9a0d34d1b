"""What every stage of the job needs to know about where it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from distill.config.schema import JobConfig
from distill.distributed.roll_call import RollCall
from distill.distributed.store import Control
from distill.observability.perfetto import write_perfetto
from distill.observability.tensorboard import Scalars
from distill.observability.trace import Trace
from distill.storage.run_directory import RunDirectory

log = logging.getLogger("distill")


@dataclass(frozen=True)
class Context:
    """This rank's place in the job. `roll_call` says where all ranks run; `console` is used by rank 0 only; `identity`
    is what decides the job's results; `watchers` accompany every stage by its name. The command began at `started_s`
    (seconds of the epoch); fine-tuning is to end at `deadline_s`, where a budget in time says so and no earlier attempt
    has begun it."""

    config: JobConfig
    control: Control
    run: RunDirectory
    device: torch.device
    roll_call: RollCall
    console: Console
    trace: Trace
    scalars: Scalars
    identity: Mapping[str, Any]
    started_s: float
    watchers: Sequence[Callable[[str], AbstractContextManager[None]]] = ()
    deadline_s: float | None = None

    @property
    def rank(self) -> int:
        return self.control.rank

    @property
    def world_size(self) -> int:
        return self.control.world_size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes the run directory and speaks to the user."""
        return self.rank == 0

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Let the watchers see what is inside as the work of a stage, unless an earlier attempt has done it."""
        if self.run.result(stage) is not None:
            yield
            return
        with ExitStack() as stack:
            for watch in self.watchers:
                stack.enter_context(watch(stage))
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write what the watchers have seen inside, also where it fails."""
        try:
            yield
        finally:
            self.scalars.close()
            self.trace.save(self.run.path / "traces")
            if self.leads:
                write_perfetto(self.run.path)

    def say(self, text: str) -> None:
        """Tell the user something, once."""
        if self.leads:
            log.info("%s", text)

    def completed(self, stage: str) -> Any:
        """Return the result of a stage that is complete, else None; rank 0 looks and all ranks get its answer."""
        if self.leads:
            self.control.set(f"completed/{stage}", {"result": self.run.result(stage)})
        return self.control.wait(f"completed/{stage}", peer=0, purpose=f"state of stage {stage}")["result"]

    def lead(self, stage: str, work: Callable[[], Any], *, made: Sequence[str] = (), used: Sequence[str] = ()) -> Any:
        """Let rank 0 alone do a stage's work, unless it is complete; every rank returns the recorded result. The work
        makes and uses these files of the run directory."""
        result = self.completed(stage)
        if result is not None:
            return result
        if self.leads:
            result = work()
            self.run.complete(stage, result, made=made, used=used)
            self.control.set(f"result/{stage}", {"result": result})
            return result
        return self.control.wait(f"result/{stage}", peer=0, purpose=f"end of stage {stage}")["result"]
