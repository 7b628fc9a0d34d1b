"""Which host this is, so that ranks can tell whether they share one, and what memory it has to spare. No torch."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

MEMORY = Path("/proc/meminfo")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers and network namespaces of a machine


def host_identity() -> int:
    """Return a positive number that ranks have in common where they run on one machine under one host name."""
    boot = BOOT_ID.read_text() if BOOT_ID.exists() else ""
    return int.from_bytes(hashlib.sha256(f"{socket.gethostname()} {boot}".encode()).digest()[:7], "big") + 1


def available_memory() -> int:
    """Return the bytes that can be used without pushing anything out, as Linux estimates it: files that it keeps in
    memory for later reading do not count as used."""
    line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])
