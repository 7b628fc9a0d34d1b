"""What the metrics say of a delivery that goes on while they are written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.job import deliver


def test_a_reading_amid_the_delivery_is_no_stage_s(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: dict[str, Any] = {
        "stages": {"distill": {"joules": 5.0}, "deliver": {"joules": 1.0}},
        "devices": [{"joules": {"distill": 5.0, "deliver": 1.0}}],
    }
    monkeypatch.setattr(deliver, "summarize", lambda _: spent)
    context: Any = SimpleNamespace(run=SimpleNamespace(path=Path()))
    ledger: Any = SimpleNamespace(entries={0: SimpleNamespace(steps=5)})
    found = deliver._energy(context, ledger, batch_size=2)
    assert list(found["stages"]) == ["distill"]
    assert found["devices"] == [{"joules": {"distill": 5.0}}]
    assert found["joules_per_image"] == {"distill": 0.5, "job": 0.5}
