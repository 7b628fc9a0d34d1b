"""Cores and memory that this process may use: affinity, and control groups in made-up trees of /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distill.errors import ConfigError
from distill.machine import cgroups, host
from tests.opened import opened

GIB = 2**30
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "34 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def tree(root: Path, *, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """Make /proc/self/cgroup, /proc/self/mountinfo and files under /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(f"23 1 0:20 / / rw - ext4 /dev/sda rw\n{mounts}")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert cgroups.cpu_quota(tmp_path) is None
    assert cgroups.memory_left(tmp_path) is None
    root = tree(tmp_path, groups="0::/\n", mounts=V2, files={})
    assert cgroups.cpu_quota(root) is None
    assert cgroups.memory_left(root) is None


def test_the_tightest_limit_up_the_tree_holds_in_version_2(tmp_path: Path) -> None:
    job = "system.slice/slurmstepd.scope/job_7"
    files = {
        f"{job}/memory.max": f"{8 * GIB}\n",
        f"{job}/memory.high": "max\n",
        f"{job}/memory.current": f"{3 * GIB}\n",
        f"{job}/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        f"{job}/cpu.max": "400000 100000\n",
        f"{job}/step_0/user/task_0/memory.max": "max\n",
        f"{job}/step_0/user/task_0/memory.current": f"{GIB}\n",
        f"{job}/step_0/user/task_0/cpu.max": "max 100000\n",
        "system.slice/memory.max": f"{64 * GIB}\n",
        "system.slice/memory.current": f"{10 * GIB}\n",
        "system.slice/cpu.max": "1000000 100000\n",
    }
    root = tree(tmp_path, groups=f"0::/{job}/step_0/user/task_0\n", mounts=V2, files=files)
    assert cgroups.cpu_quota(root) == 4.0
    assert cgroups.memory_left(root) == 6 * GIB


def test_pressure_before_the_limit_counts(tmp_path: Path) -> None:
    files = {"memory.max": f"{8 * GIB}\n", "memory.high": f"{2 * GIB}\n", "memory.current": f"{3 * GIB}\n"}
    assert cgroups.memory_left(tree(tmp_path, groups="0::/\n", mounts=V2, files=files)) == 0


@pytest.mark.parametrize("mounted", ["/", "/docker/ab"], ids=["seen from the host", "seen from the container"])
def test_version_1_is_read_from_each_controller_s_own_tree(tmp_path: Path, mounted: str) -> None:
    inside = "memory" if mounted != "/" else "memory/docker/ab"
    files = {
        f"{inside}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{inside}/memory.usage_in_bytes": f"{2 * GIB}\n",
        f"{inside}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
        "cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "150000\n",
        "cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    if mounted == "/":
        files |= {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "5\n"}
    groups = "5:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n1:name=systemd:/\n0::/\n"
    root = tree(tmp_path, groups=groups, mounts=V1.format(mounted=mounted), files=files)
    assert cgroups.cpu_quota(root) == 1.5
    assert cgroups.memory_left(root) == 3 * GIB


def test_both_versions_at_once_are_told_apart(tmp_path: Path) -> None:
    files = {"unified/job/cpu.max": "100000 100000\n", "memory/job/memory.limit_in_bytes": f"{GIB}\n"}
    mounts = V1.format(mounted="/").splitlines()[1] + "\n" + V2.replace("cgroup rw", "cgroup/unified rw", 1)
    root = tree(tmp_path, groups="5:memory:/job\n0::/job\n", mounts=mounts, files=files)
    assert (cgroups.cpu_quota(root), cgroups.memory_left(root)) == (1.0, GIB)


def test_a_group_outside_of_what_is_mounted_has_the_limits_of_the_mount(tmp_path: Path) -> None:
    root = tree(tmp_path, groups="0::/../other\n", mounts=V2, files={"cpu.max": "200000 100000\n"})
    assert cgroups.cpu_quota(root) == 2.0


@pytest.mark.parametrize(("quota", "cores"), [(None, 6), (2.5, 2), (0.5, 1), (64.0, 6)])
def test_cores_are_those_it_may_run_on_within_its_quota(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(cgroups, "cpu_quota", lambda: quota)
    assert host.available_cores() == cores
    assert host.share_of_cores(4) == max(1, cores // 4)


def test_memory_is_the_host_s_or_what_is_left_of_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    monkeypatch.setattr(host, "MEMORY", tmp_path / "meminfo")
    for left, expected in ((None, 8 * GIB), (2 * GIB, 2 * GIB), (20 * GIB, 8 * GIB)):
        monkeypatch.setattr(cgroups, "memory_left", lambda left=left: left)
        assert host.available_memory() == expected


def test_decoding_processes_are_the_rank_s_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_cores", lambda: 12)
    for ranks, expected in ((1, 8), (2, 6), (4, 3), (24, 1)):
        with opened(num_workers=None, ranks_here=ranks) as dataset:
            assert dataset._reading.num_workers == expected
    with opened(num_workers=5) as dataset:
        assert dataset._reading.num_workers == 5


def test_a_set_that_memory_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "memory_left", lambda: 1_200_000)
    opened().close()
    monkeypatch.setattr(cgroups, "memory_left", lambda: 1_000_000)
    with pytest.raises(ConfigError, match=r"less than 0\.00103, so that images are streamed") as caught:
        opened()
    assert caught.value.setting == "data.memory_limit_gib"
