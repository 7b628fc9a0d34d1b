"""One Slurm for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, cluster, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A real two-node Slurm; skips, with the reason, where there can be none."""
    reason = why_not()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    with cluster() as running:
        yield running
