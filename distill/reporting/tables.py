"""The tables that a run prints: its plan before training starts, and teacher against student at its end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from rich.table import Table

from distill.observability.numbers import finite, show, show_count, show_short
from distill.planning.plan import Plan
from distill.planning.unit import Unit
from distill.reporting.latency import Speed, latency_rows


class Size(Protocol):
    """Parameters and FLOPs of an image by block, None where there is none."""

    @property
    def params(self) -> Sequence[float | None]: ...

    @property
    def flops(self) -> Sequence[float | None]: ...


# The states of the student that one is chosen from, in the order in which they come about.
STUDENTS = {"assembled": "assembled", "recalibrated": "reconciled", "refined": "refined", "finetuned": "fine-tuned"}


class Seconds(Protocol):
    """Of the teacher's forward by block, and of one step of a student by a unit's number."""

    @property
    def teacher(self) -> Sequence[float]: ...

    @property
    def student(self) -> Sequence[float]: ...


EXPLANATION = (
    "FLOP: of one image in use, 2 per multiply-add. ms: of a batch in training, "
    "the teacher's forward and a step of the student, which keeps what is not trained. "
    "error: relative, of first weights."
)


def plan_table(
    plan: Plan,
    names: Sequence[str],
    units: Collection[Unit],
    *,
    sizes: tuple[Size, Size],
    costs: Seconds,
    start: Mapping[int, float],
) -> Table:
    """Return who trains what: what every block of teacher and student holds, computes in use and costs to train, how
    far off the student is before that (`start`, by number), and what that makes of the whole network. Units besides
    those of single blocks (`names`) have rows of their own, below the block with which they begin, and are no part of
    the whole."""
    teacher, student = sizes
    owner = {unit: rank for rank, owned in enumerate(plan.owners) for unit in owned}
    spans = {span.unit: span for span in plan.spans}
    title = f"plan: {plan.label} on {show_count(plan.world_size, 'rank')}"
    table = Table(
        title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), caption=EXPLANATION, caption_justify="left"
    )
    # Headings of two lines leave 80 columns enough for a block's name.
    for heading in ("block", "rank", "steps", "teacher\nparams", "student\nparams", "teacher\nFLOP", "student\nFLOP",
                    "teacher\nms", "student\nms", "error"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "block" else "right", overflow="fold")

    def add(name: str, number: int, block: int | None) -> None:
        """Add the row of a unit, and beside it the block that it is for."""
        span = spans.get(number)
        table.add_row(
            name,
            str(owner[number]) if span else "-",
            ("" if span.first == 0 else f"{span.first}-") + str(span.budget) if span else "-",
            "" if block is None else show_short(teacher.params[block]),
            show_short(student.params[number]),
            "" if block is None else show_short(teacher.flops[block]),
            show_short(student.flops[number]),
            "" if block is None else f"{1000 * costs.teacher[block]:.1f}",
            f"{1000 * costs.student[number]:.1f}" if costs.student[number] else "-",
            f"{start[number]:.2g}" if number in start else "-",
        )

    for block, name in enumerate(names):
        add(name, block, block)
        for unit in units:
            if unit.input == block and unit.number >= len(names):
                add(unit.name, unit.number, None)
    table.add_row(
        "all blocks", "", "", *(show_short(total) for total in _totals(teacher.params, student.params[: len(names)])),
        *(show_short(total) for total in _totals(teacher.flops, student.flops[: len(names)])),
        f"{1000 * sum(costs.teacher):.1f}", f"{1000 * sum(costs.student[: len(names)]):.1f}", "",
        style="bold",
    )  # fmt: skip
    return table


def _totals(teacher: Sequence[float | None], student: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Of both networks; None where a block's part is not known."""
    whole = [own if own is not None else kept for own, kept in zip(student, teacher, strict=True)]
    known = None not in teacher
    return tuple(sum(filter(None, side)) if known else None for side in (teacher, whole))  # type: ignore[return-value]


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Return the teacher-against-student table that ends a run."""
    table = Table(title="teacher against student", title_justify="left", box=None)
    for heading in ("", "teacher", "student", "ratio"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for row in result_rows(metrics):
        table.add_row(*row)
    return table


def result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (what, teacher, student, ratio or difference); a figure that is missing is "-"."""
    teacher, student = metrics["teacher"], metrics["student"]

    def row(label: str, key: str, form: str, scale: float = 1.0) -> tuple[str, str, str, str]:
        a, b = (None if finite(side.get(key)) is None else side[key] * scale for side in (teacher, student))
        return label, show(a, form), show(b, form), f"{b / a:.3f}" if a and b is not None else "-"

    return [
        *_accuracies(teacher, student),
        *([row("top-5", "top5", "{:.2f} %")] if teacher.get("top5") is not None else []),
        row("parameters", "params", "{:,.0f}"),
        *([row("parameters that are not zero", "nonzero_params", "{:,.0f}")] if _is_sparse(student) else []),
        row("parameters of replaced convolutions", "replaced_params", "{:,.0f}"),
        row("bytes", "bytes", "{:,.0f}"),
        *_packed(teacher, student),
        row("MFLOP per image (2 per multiply-add)", "flops", "{:,.2f}", 1e-6),
        *(_latency(label, speed) for label, speed in latency_rows(metrics)),
    ]


def _is_sparse(student: Mapping[str, Any]) -> bool:
    return "packed_bytes" in student


def _packed(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return a row for the file without the zeros, beside the teacher's weights."""
    if not _is_sparse(student):
        return []
    a, b = finite(teacher.get("bytes")), finite(student["packed_bytes"])
    share = finite(student.get("packed_share"))
    return [("bytes of the packed file", show(a, "{:,.0f}"), show(b, "{:,.0f}"), show(share, "{:.4f}"))]


def _latency(label: str, speed: Speed) -> tuple[str, str, str, str]:
    a, b = speed.teacher, speed.student
    return label, show(a, "{:.2f} ms"), show(b, "{:.2f} ms"), f"{b / a:.3f}" if a and b is not None else "-"


def _accuracies(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return a row for every state of the student on test images, which one is delivered, and the validation images'
    figures that decided it with their standard error."""
    a, delivered, validation = finite(teacher.get("top1")), student.get("delivered"), student.get("validation") or {}
    rows: list[tuple[str, float | None, bool]] = []
    for name, label in STUDENTS.items():
        b = finite(student.get(f"top1_{name}"))
        if b is not None and (not validation or name in validation["top1"]):
            rows.append((f"top-1, {label}", b, name == delivered))
    if delivered is None:
        rows.append(("top-1", finite(student.get("top1")), False))  # of a run that did not choose
    error = show(validation.get("standard_error"), "+-{:.1f} points")
    return [
        (
            f"{label}, delivered" if chosen else label,
            show(a, "{:.2f} %"),
            show(b, "{:.2f} %"),
            "-" if a is None or b is None else f"{b - a:+.2f} points",
        )
        for label, b, chosen in rows
    ] + [
        (f"validation top-1, {STUDENTS[name]}", "-", show(b, "{:.2f} %"), error)
        for name, b in validation.get("top1", {}).items()
    ]
