"""From a run directory to tables and one self-contained HTML page; needs no torch and runs on a laptop."""

from __future__ import annotations

import html
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from distill.files import read_json, write_text
from distill.plan import Plan

CURVE_POINTS = 400  # of one block's curve: more than its width in pixels, so that long runs keep the page small


class PerBlock(Protocol):
    """Costs of the teacher's forward and of one student step, by block."""

    @property
    def teacher(self) -> Sequence[float]: ...

    @property
    def student(self) -> Sequence[float]: ...


def plan_table(
    plan: Plan, names: Sequence[str], *, costs: PerBlock, flops: PerBlock, boundary_bytes: Sequence[int]
) -> Table:
    """Return who trains what, with both costs of every block side by side: seconds and counted FLOPs."""
    owner = {block: rank for rank, blocks in enumerate(plan.owners) for block in blocks}
    spans = {span.block: span for span in plan.spans}
    table = Table(title=f"plan: {plan.strategy} on {plan.world_size} ranks", title_justify="left", box=None)
    for heading in ("block", "rank", "steps", "teacher ms", "student ms", "teacher MFLOP", "student MFLOP", "input MB"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for block, name in enumerate(names):
        trained = block in spans
        table.add_row(
            name,
            str(owner[block]) if trained else "-",
            f"{spans[block].first}-{spans[block].budget}" if trained else "-",
            f"{1000 * costs.teacher[block]:.1f}",
            f"{1000 * costs.student[block]:.1f}" if costs.student[block] else "-",
            f"{flops.teacher[block] / 1e6:.0f}",
            f"{flops.student[block] / 1e6:.0f}" if flops.student[block] else "-",
            f"{boundary_bytes[block] / 1e6:.2f}",
        )
    return table


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Return the teacher-against-student table that ends a run."""
    table = Table(title="teacher against student", title_justify="left", box=None)
    for heading in ("", "teacher", "student", "ratio"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for row in _result_rows(metrics):
        table.add_row(*row)
    return table


def _result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    teacher, student = metrics["teacher"], metrics["student"]

    def row(label: str, key: str, form: str, scale: float = 1.0) -> tuple[str, str, str, str]:
        a, b = teacher[key] * scale, student[key] * scale
        return label, form.format(a), form.format(b), f"{b / a:.3f}" if a else "-"

    def points(label: str, value: float) -> tuple[str, str, str, str]:
        return label, f"{teacher['top1']:.2f} %", f"{value:.2f} %", f"{value - teacher['top1']:+.2f} points"

    return [
        points("top-1, assembled", student["top1_assembled"]),
        points("top-1, batch norms re-estimated", student["top1_recalibrated"]),
        points("top-1", student["top1"]),
        row("top-5", "top5", "{:.2f} %"),
        row("parameters", "params", "{:,.0f}"),
        row("parameters of replaced convolutions", "replaced_params", "{:,.0f}"),
        row("bytes", "bytes", "{:,.0f}"),
        row("MFLOP per image (2 per multiply-add)", "flops", "{:,.2f}", 1e-6),
        row("latency, batch 1 (ms)", "latency_ms_batch1", "{:.2f}"),
        row("latency, batch 64 (ms)", "latency_ms_batch64", "{:.2f}"),
    ]


def write_report(run_dir: Path) -> Path:
    """Write report.html from metrics.json, costs.json and metrics/*.jsonl of a run directory; return its path."""
    metrics = read_json(run_dir / "metrics.json")
    course: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for file in sorted((run_dir / "metrics").glob("rank*.jsonl")):
        for line in file.read_text(errors="replace").splitlines():
            try:
                reading = json.loads(line)
            except ValueError:  # a rank was killed while it wrote: one point less
                continue
            course[reading["block"]].append((reading["step"], reading["relative_error"]))
    costs = read_json(run_dir / "costs.json")
    path = run_dir / "report.html"
    write_text(path, _page(metrics, course, costs))
    return path


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667; --line: #ccd; --paper: #fff; --bar: #2a6fbb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa; --line: #445; --paper: #14171a; --bar: #6aa9ea; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; } th { font-weight: 600; color: var(--soft); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); } 
svg { width: 100%; height: auto; display: block; }
polyline { fill: none; stroke: var(--bar); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
svg rect { fill: none; stroke: var(--line); vector-effect: non-scaling-stroke; }
"""


def _page(
    metrics: Mapping[str, Any], course: Mapping[int, Sequence[tuple[int, float]]], costs: Mapping[str, Any] | None
) -> str:
    title = f"{metrics['teacher']['name']} on {metrics['data']['name']}"
    distill, environment = metrics["distill"], metrics["environment"]
    run = [
        ("strategy", f"{distill['strategy']} on {distill['world_size']} ranks"),
        ("distill stage, measured", f"{distill['seconds']:.1f} s"),
        ("distill stage, predicted", f"{distill['makespan_predicted_s']:.1f} s"),
        ("images per second", f"{distill['images_per_second']:.0f}"),
        ("idle share by rank", ", ".join(f"{100 * share:.1f} %" for share in distill["idle_share"])),
        ("CPU seconds, all ranks", f"{distill['cpu_seconds']:.1f}"),
        ("sent to other ranks", f"{distill['bytes_sent'] / 1e6:.1f} MB"),
        ("energy", "not measured"),
        *((name, str(value)) for name, value in environment.items()),
        ("seed", str(metrics["seed"])),
        ("fingerprint", metrics["fingerprint"]),
    ]
    blocks = [
        (b["name"], str(b["rank"]), str(b["steps"]), f"{b['rel_error_first']:.4f}", f"{b['rel_error_last']:.4f}",
         f"{b['seconds']:.1f}", b["status"])
        for b in metrics["blocks"]
    ]  # fmt: skip
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(("", "teacher", "student", "ratio"), _result_rows(metrics)),
        "<h2>Blocks</h2>",
        _table(("block", "rank", "steps", "first relative error", "last", "seconds", ""), blocks),
        "<h2>Relative error by step (logarithmic)</h2>",
        '<div class="curves">',
        *(_curve(b["name"], course.get(b["block"], [])) for b in metrics["blocks"]),
        "</div>",
        "<h2>Cost of a block: measured and counted</h2>" if costs else "",
        _costs_table(costs) if costs else "",
        "<h2>Run</h2>",
        _table(("", ""), run),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


def _costs_table(costs: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{1000 * t:.1f}", f"{1000 * s:.1f}" if s else "-", f"{tf / 1e6:.0f}", f"{sf / 1e6:.0f}" if sf else "-")
        for name, t, s, tf, sf in zip(
            costs["blocks"], costs["seconds"]["teacher"], costs["seconds"]["student"],
            costs["flops"]["teacher"], costs["flops"]["student"], strict=True,
        )
    ]  # fmt: skip
    return _table(("block", "teacher ms", "student ms", "teacher MFLOP", "student MFLOP"), rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _curve(name: str, readings: Sequence[tuple[int, float]]) -> str:
    """A small line chart of relative error against step, both axes from the readings' own range."""
    points = [(step, math.log10(error)) for step, error in sorted(readings) if error > 0 and math.isfinite(error)]
    points = [*points[:-1][:: 1 + len(points) // CURVE_POINTS], *points[-1:]]
    if len(points) < 2:
        return f"<figure><figcaption>{html.escape(name)}: no readings</figcaption></figure>"
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = min(values), max(values)
    width, height = 200, 100
    scale_x = width / max(1, max(steps) - min(steps))
    scale_y = height / max(1e-9, high - low)
    line = " ".join(f"{(s - min(steps)) * scale_x:.1f},{(high - v) * scale_y:.1f}" for s, v in points)
    caption = f"{html.escape(name)}: {10 ** values[0]:.3g} to {10 ** values[-1]:.3g}, {max(steps)} steps"
    return (
        f'<figure><svg viewBox="-2 -2 {width + 4} {height + 4}" role="img" aria-label="{html.escape(name)}">'
        f'<rect width="{width}" height="{height}"/><polyline points="{line}"/></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
