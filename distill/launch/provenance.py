"""Where a result comes from: when, how long, by which command and version, on which host and processor. No torch."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from distill.version import __version__

STARTED_VARIABLE = "DISTILL_STARTED"  # when that was, in seconds of the epoch
COMMAND_VARIABLE = "DISTILL_COMMAND"  # what the user typed, for the ranks that a launcher starts
CPU_FACTS = Path("/proc/cpuinfo")


def process_start() -> float:
    """Return when this process began, in seconds of the epoch; to be asked early, when it has done nothing but import.

    Waiting for a disk is not seen.
    """
    return time.time() - time.process_time()


def command_start() -> float:
    """Return when the command of this rank began, as its launcher says, in seconds of the epoch."""
    return float(os.environ.get(STARTED_VARIABLE) or process_start())


def of_job(started_s: float) -> dict[str, Any]:
    """Return what tells this attempt from others; `started_s` is its beginning in seconds of the epoch."""
    now = time.time()
    return {
        "command": os.environ.get(COMMAND_VARIABLE) or _torchruns_command(),
        "started_at": _date(started_s),
        "finished_at": _date(now),
        "duration_s": round(now - started_s, 3),
    }


def of_place() -> dict[str, Any]:
    """Return the versions and the machine of this process."""
    return {
        "distill": __version__,
        "commit": commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
    }


def commit(folder: Path) -> str | None:
    """Return the commit of a checkout, with "+" where it has been changed since; None where there is none."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git here, or not this user's checkout
        return None
    return done.stdout.strip()


def cpu_model() -> str | None:
    """Return the name of the processor, as Linux has it."""
    lines = CPU_FACTS.read_text(errors="replace").splitlines() if CPU_FACTS.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, None) or platform.processor() or None


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")


def _torchruns_command() -> str:
    ranks, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = [f"--nnodes={ranks // here}"] if ranks > here else []
    return shlex.join(["torchrun", *nodes, f"--nproc-per-node={here}", "-m", "distill", *sys.argv[1:]])
