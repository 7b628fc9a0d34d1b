"""Predicted against measured: one student step of every block, every rank's busy seconds, the makespan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.observability.numbers import finite, show, show_seconds
from distill.reporting.markup import Markup, join, table, tag
from distill.reporting.plot import bar, legend
from distill.reporting.run import Run


def predictions(run: Run) -> Markup:
    """Return the ranks' and the blocks' tables, each part where the run directory has what it needs."""
    parts = join(_ranks(run), _blocks(run))
    key = legend([("k predicted", "predicted"), ("k student", "measured")])
    return join(key, parts) if parts else parts


def _ranks(run: Run) -> Markup:
    distill = run.part("distill")
    shares = distill.get("idle_share", [])
    seconds = finite(distill.get("seconds"))
    makespan = finite(distill.get("makespan_predicted_s", run.plan.get("predicted_makespan_s")))
    if makespan is None:
        return Markup()
    known: list[tuple[str, float | None, float | None, str, str, str]] = []
    needed, had = run.costs.get("peak_memory_bytes", []), distill.get("peak_memory_bytes", [])
    for rank, predicted in enumerate(run.plan.get("predicted_rank_s", [])):
        share = finite(shares[rank]) if rank < len(shares) else None
        busy = seconds * (1 - share) if seconds is not None and share is not None else None
        idle = show(share and 100 * share, "{:.1f} %")
        known.append((f"rank {rank}, busy", finite(predicted), busy, idle, _gib(needed, rank), _gib(had, rank)))
    known.append(("makespan", makespan, seconds, "", "", ""))
    longest = max(value for _, *both, _, _, _ in known for value in both if value is not None)
    rows = [
        (
            name,
            _pair(name, expected, got, longest),
            show_seconds(expected),
            show_seconds(got),
            ratio(got, expected),
            *others,
        )
        for name, expected, got, *others in known
    ]
    headings = ("", "", "predicted", "measured", "ratio", "idle share", "predicted GiB", "peak GiB")
    return table(headings, rows, text=(0, 1), tall=True)


def _gib(sizes: Sequence[Any], rank: int) -> str:
    """Return a rank's memory as text."""
    number = finite(sizes[rank]) if rank < len(sizes) else None
    return show(None if number is None else number / 2**30, "{:.2f}")


def _blocks(run: Run) -> Markup:
    blocks = [block for block in run.units if block.step_s is not None or block.predicted_step_s is not None]
    if not blocks:
        return Markup()
    longest = max(value for block in blocks for value in (block.step_s, block.predicted_step_s) if value is not None)
    flops = run.costs.get("flops", {})
    teacher = run.costs.get("seconds", {}).get("teacher", [])
    rows = [
        (
            block.name,
            _pair(block.name, block.predicted_step_s, block.step_s, longest),
            _milliseconds(block.predicted_step_s),
            _milliseconds(block.step_s),
            ratio(block.step_s, block.predicted_step_s),
            _milliseconds(teacher[block.unit] if block.unit < len(teacher) else None),
            _mega(flops, "teacher", block.unit),
            _mega(flops, "student", block.unit),
        )
        for block in blocks
    ]
    headings = ("block", "student step", "predicted ms", "measured ms", "ratio", "teacher ms",
                "teacher MFLOP", "student MFLOP")  # fmt: skip
    return table(headings, rows, text=(0, 1), tall=True, kind="sorts")


def _pair(name: str, predicted: float | None, measured: float | None, longest: float) -> Markup:
    label = f"{name}: predicted {show_seconds(predicted)}, measured {show_seconds(measured)}"
    above = bar([(predicted or 0.0, "predicted")], whole=longest, label=label)
    below = bar([(measured or 0.0, "student")], whole=longest, label=label)
    return tag("div", above, below, class_="two")


def ratio(value: float | None, base: float | None) -> str:
    """Return value / base as text."""
    return "-" if value is None or not base else f"{value / base:.2f}"


def _milliseconds(seconds: Any) -> str:
    number = finite(seconds)
    return show(None if number is None else 1000 * number, "{:.2f}")


def _mega(flops: Mapping[str, Any], side: str, block: int) -> str:
    counts = flops.get(side, [])
    number = finite(counts[block]) if block < len(counts) else None
    return show(number / 1e6, "{:,.0f}") if number else "-"
