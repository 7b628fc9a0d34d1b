"""What a session reports, and who takes part in one."""

import threading
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from distill.engine.session import RankReport, Session, SessionReport
from distill.planning.costs import Span
from distill.planning.plan import Plan


def test_a_rank_is_idle_while_it_waits_and_once_it_has_left() -> None:
    worked = RankReport(
        seconds=8.0, waited_s=2.0, cpu_s=1.0, teacher_s=0.0, teacher_passes=0, bytes_sent=0, peak_memory_bytes=0
    )
    report = SessionReport(10.0, {0: worked})
    assert report.idle_share(0) == pytest.approx(0.4)
    assert report.idle_share(1) == 1.0


def test_a_rank_that_has_nothing_to_do_returns_without_a_connection_or_a_thread() -> None:
    nothing: dict[str, Any] = {field.name: None for field in fields(Session)}
    plan = Plan("broadcast", ((0,), ()), (Span(0, 0, 1),), 1.0, (1.0, 0.0))
    threads = threading.active_count()
    Session(**nothing | {"plan": plan, "control": SimpleNamespace(rank=1)}).follow([])  # whose other parts are None
    assert threading.active_count() == threads
