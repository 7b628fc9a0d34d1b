"""What a session reports."""

import pytest

from distill.session import RankReport, SessionReport


def test_a_rank_is_idle_while_it_waits_and_once_it_has_left() -> None:
    worked = RankReport(
        seconds=8.0, waited_s=2.0, cpu_s=1.0, teacher_s=0.0, teacher_passes=0, bytes_sent=0, peak_memory_bytes=0
    )
    report = SessionReport(10.0, {0: worked})
    assert report.idle_share(0) == pytest.approx(0.4)
    assert report.idle_share(1) == 1.0
