"""Which host this is, so that ranks can tell whether they share one, and what of it this process may use. No torch."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

from distill.machine import cgroups

MEMORY = Path("/proc/meminfo")
SHARED = Path("/dev/shm")
CPU_FACTS = Path("/proc/cpuinfo")
NVIDIA = Path("/dev/nvidiactl")  # there wherever a process can reach an NVIDIA GPU
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers and network namespaces of a machine


def machine_identity() -> str:
    """Return what all that run on one machine have in common since it started, whatever they call it; where that is
    not to be had, the host's name."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()


def host_identity() -> int:
    """Return a positive number that ranks have in common where they run on one machine under one host name."""
    named = f"{socket.gethostname()} {machine_identity()}"
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:7], "big") + 1


def available_cores() -> int:
    """Return how many cores this process may keep busy, at least 1: those it may run on, and no more whole ones than
    the time that its control groups give it. A batch system's job or a container often has few of many."""
    quota = cgroups.cpu_quota()
    allowed = len(os.sched_getaffinity(0))
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def share_of_cores(num_processes: int) -> int:
    """Return how many of its cores this process may keep busy where so many are on the host that do the same."""
    return max(1, available_cores() // num_processes)


def channels_at_a_time() -> int:
    """Return in steps of how many channels kernels are fast here: 16 with AVX-512 or an NVIDIA GPU, 8 without."""
    flags = CPU_FACTS.read_text().split() if CPU_FACTS.exists() else []
    return 16 if "avx512f" in flags or NVIDIA.exists() else 8


def available_memory() -> int:
    """Return the bytes that this process can use without pushing anything out: as Linux estimates it for the host
    (files that it keeps in memory for later reading do not count as used), at most what its control groups leave."""
    line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
    left, spare = cgroups.memory_left(), 1024 * int(line.split()[1])
    return spare if left is None else min(left, spare)


def shared_memory_left() -> int:
    """Return the bytes that processes can still share by name: a container is given 64 MB by default."""
    status = os.statvfs(SHARED)
    return status.f_bavail * status.f_frsize
