"""What control groups (version 1, 2 or both) leave this process: a container's limits, a batch system's, a service's.

A limit may stand anywhere on the way from the process's own group up to the root that it can see, as Slurm's stand at
the job and the task lies two levels deeper; the tightest holds. Only reads files under /proc and /sys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")
NO_LIMIT = 2**60  # bytes; version 1 says "none" with the largest number of whole pages


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many cores' worth of time this process may use, None where that is not limited."""
    quotas = []
    for folder in _folders(root, "cpu"):
        if (folder / "cpu.max").exists():  # version 2: microseconds, or max, of a period
            quota, period = map(_number, (_text(folder / "cpu.max") or "max 1").split())
        else:
            quota, period = (_number(_text(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_left(root: Path = ROOT) -> int | None:
    """Return how many bytes more this process may use, None where that is not limited. Files that are kept in memory
    for later reading, and have not been read again, count as free: they go first."""
    left = []
    for folder in _folders(root, "memory"):
        if (folder / "memory.current").exists():  # version 2; at memory.high processes are slowed down to a standstill
            limits, used, cached = ["memory.max", "memory.high"], "memory.current", "inactive_file"
        else:
            limits, used, cached = ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_inactive_file"
        allowed = [limit for name in limits if (limit := _number(_text(folder / name))) is not None]
        if min(allowed, default=NO_LIMIT) < NO_LIMIT:
            statistics = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
            free = min(allowed) - (_number(_text(folder / used)) or 0) + (_number(statistics.get(cached, "")) or 0)
            left.append(max(0, free))
    return min(left, default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield where the groups that this process is in have their files, its own first, for a controller."""
    groups = {}  # what is mounted -> path of the group within it; version 2 has no name
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        groups.update(dict.fromkeys(names.split(","), path))
    name = controller if controller in groups else ""
    if name not in groups:
        return
    for line in _text(root / "proc/self/mountinfo").splitlines():
        ours, _, theirs = line.partition(" - ")
        kind, _, options = theirs.split(" ", 2)
        mounted, point = (_unescaped(word) for word in ours.split()[3:5])
        if (name and kind == "cgroup" and name in options.split(",")) or (not name and kind == "cgroup2"):
            top = root / point.lstrip("/")
            group = PurePosixPath(groups[name])
            # In a container the group may be named as its host sees it while its folder is what is mounted.
            seen = group.is_relative_to(mounted) and ".." not in group.parts
            below = group.relative_to(mounted) if seen else PurePosixPath()
            for part in (below, *below.parents) if below.parts else (below,):
                yield top / part
            return


def _unescaped(word: str) -> str:
    return word.replace("\\040", " ")


def _text(path: Path) -> str:
    """Return what the file says; nothing where there is none, or it may not be read."""
    with suppress(OSError):
        return path.read_text()
    return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().lstrip("-").isdecimal() else None
