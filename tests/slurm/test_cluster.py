"""The cluster of these tests is one: jobs run on two hosts, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.cluster import Cluster


def test_a_job_runs_on_two_hosts_that_reach_each_other(slurm: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "who.sbatch"
    script.write_text("#!/bin/bash\nsrun hostname\nsrun getent hosts hostA hostB\n")
    job = slurm.submit(script, cwd=tmp_path, options=("--nodes=2",))
    slurm.wait_state(job, "COMPLETED", timeout_s=60)
    words = slurm.output(job).split()
    assert {"hostA", "hostB", "10.77.0.1", "10.77.0.2"} <= set(words)
