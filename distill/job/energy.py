"""Wiring of the energy meter: which rank reads which host's counters, and how it learns the stage that is running."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from distill.distributed.roll_call import RollCall
from distill.distributed.store import Control, PeerLostError
from distill.observability.energy.counters import open_counters
from distill.observability.energy.joules import describe, summarize
from distill.observability.energy.meter import Meter, Place, by_host

log = logging.getLogger(__name__)

FOLLOW_S = 0.5  # how late another host's reader may notice a new stage

Watcher = Callable[[str], AbstractContextManager[None]]


@contextmanager
def metering(control: Control, run_dir: Path, roll_call: RollCall) -> Iterator[tuple[Watcher, ...]]:
    """Measure energy while this is open; every rank must enter. Yields what is to watch this rank's stages.

    The first rank of each host reads for all of it. A stage is rank 0's: the others' ranks leave the distill stage one
    by one, and what a host spends until its last rank is done belongs to it. Rank 0 ends with one line of joules.
    """
    hosts = by_host([Place(seat.rank, seat.host, seat.machine, seat.gpu) for seat in roll_call.seats])
    mine = next((host for host, group in hosts.items() if group[0].rank == control.rank), None)
    if mine is None:
        yield ()
        return
    with open_counters() as counters:
        meter = Meter(run_dir, host=mine, places=hosts[mine], counters=counters, generation=control.generation)
        with meter:
            if control.rank == 0:
                yield (_leading(control, meter, announce=len(hosts) > 1),)
            else:
                with _following(control.second(), meter):
                    yield ()
    if control.rank == 0:
        log.info("%s", describe(summarize(run_dir)))


def _leading(control: Control, meter: Meter, *, announce: bool) -> Watcher:
    """Return rank 0's watcher, which tells other hosts' readers where they are to be told."""

    def tell(stage: str | None) -> None:
        meter.switch(stage)
        if announce:
            control.set("energy/stage", stage)

    @contextmanager
    def watch(stage: str) -> Iterator[None]:
        tell(stage)
        try:
            yield
        except BaseException:
            meter.switch(None)  # and tell nobody: the store may be what has failed
            raise
        tell(None)

    return watch


@contextmanager
def _following(control: Control, meter: Meter) -> Iterator[None]:
    """Switch the meter to rank 0's stage from a thread."""
    stop = threading.Event()

    def follow() -> None:
        try:
            while not stop.wait(FOLLOW_S):
                meter.switch(control.get("energy/stage"))
        except (PeerLostError, RuntimeError) as error:
            log.warning("energy: cannot follow the stages any more, the job's store is gone (%s)", error)

    thread = threading.Thread(target=follow, name="energy-stage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
