"""How a rank that fails says so: once, in its own words, and so that nobody waits for it."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from distill.distributed.store import Control, LeaderFailedError
from distill.errors import DistillError
from distill.storage.files import DiskError, write_text

log = logging.getLogger(__name__)

MOURNING_S = 10.0  # how long a failing rank waits for rank 0 to tell the same error
FAREWELL_S = 2.0  # how long a failing rank 0 waits for the others to hear of it


def leave_word(reason: str) -> None:
    """Tell the agent that started this rank why it fails, in the file where torch's agents look for that."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        facts = {"timestamp": str(int(time.time())), "py_callstack": traceback.format_exc()}
        with suppress(DiskError):  # a full disk may be the very reason
            write_text(Path(path), json.dumps({"message": {"message": reason, "extraInfo": facts}}))


def tell(error: DistillError, control: Control) -> None:
    """Log an error, and print it once: the same mistake usually stops every rank."""
    if logging.getLogger("distill").handlers:
        log.error("%s", error)
    if control.rank == 0:
        sys.stderr.write(f"distill: {error}\n")
        let_peers_know(control)
        return
    if not isinstance(error, LeaderFailedError):
        deadline = time.monotonic() + MOURNING_S
        with suppress(LeaderFailedError):
            while time.monotonic() < deadline:
                if control.get("failed"):
                    control.set(f"mourned/{control.rank}", True)
                    time.sleep(MOURNING_S)
                    return
                time.sleep(0.1)
    sys.stderr.write(f"distill: {error}\n")


def let_peers_know(control: Control) -> None:
    """Rank 0 stays until those who wait for it know that it has failed: it may serve the store, whose loss they would
    report instead."""
    with suppress(DistillError, RuntimeError):  # the store may be what has failed
        control.set("failed", True)
        deadline = time.monotonic() + FAREWELL_S
        peers = set(range(1, control.world_size))
        while peers and time.monotonic() < deadline:
            peers -= {peer for peer in peers if control.get(f"mourned/{peer}")}
            time.sleep(0.05)
