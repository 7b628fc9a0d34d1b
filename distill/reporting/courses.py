"""How errors, losses and accuracies went: every block's relative error by step; by epoch, teacher's and student's loss
and the student's validation accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.observability.numbers import finite, show, show_count
from distill.reporting.markup import Markup, escape, folded, join, tag
from distill.reporting.plot import Axis, chart, curve, point, stretched, tick_label
from distill.reporting.run import Run, UnitState

POINTS_IN_ALL = 20_000  # of all blocks' curves: about 0.3 MB
MOST_OPEN = 24  # more blocks than this have their own plots folded away
MOST_SOLID = 12  # more lines than this cannot be told apart by their colours alone
DASHES = 4  # patterns, one after another: lines of one pattern are as far apart in colour as a fourth of them would be
MOST_DOTS = 200

Course = Sequence[tuple[int, float]]  # (epoch, value)


def block_curves(run: Run) -> Markup:
    """Return all blocks' loss curves in one plot with one scale, then each block's own on the same scale."""
    blocks = [block for block in run.units if _drawable(block)]
    silent = [block.name for block in run.units if not _drawable(block)]
    if not blocks:
        return Markup()
    x = Axis.around((step for block in blocks for step, _ in block.course), zero=True, whole=True)
    y = Axis.around((error for block in blocks for _, error in block.course), log=True)
    most = min(300, max(30, POINTS_IN_ALL // len(blocks)))
    lines = []
    for n, block in enumerate(blocks):
        path, name = curve(block.course, x, y, most=most), escape(block.name)
        lines.append(f'<path id="c{n}" class="{_look(n, len(blocks))}" data-s="b{n}" data-name="{name}" d="{path}"/>')
    fall = f"from {tick_label(y.high)} down to {tick_label(y.low)}"
    label = f"relative error by step of {show_count(len(blocks), 'block')}, {fall}"
    y_title = "relative error of the block's output, logarithmic"
    overview = chart(stretched("".join(lines)), x, y, x_title="step", y_title=y_title, label=label, kind="wide")
    small = [_small(n, block, x, y) for n, block in enumerate(blocks)]
    missing = tag("p", f"No readings of: {', '.join(silent)}", class_="note") if silent else Markup()
    own = tag("div", *small, class_="small-multiples")
    parts = own if len(blocks) <= MOST_OPEN else folded(f"Every block's own plot ({len(blocks)})", own)
    return join(overview, _key(blocks), missing, parts)


def _drawable(block: UnitState) -> bool:
    return any(error > 0 and finite(error) is not None for _, error in block.course)


def _look(index: int, number: int) -> str:
    """Return the classes of a block's line: its colour says where it lies between the first and the last; every other
    one is nearer to the ink, so that neighbours differ in more than their hue; and where colours do not suffice,
    neighbours have other patterns."""
    place = f"line p{100 * index / max(1, number - 1):.0f}"
    return place + " shaded" * (index % 2) + f" d{index % DASHES}" * (number > MOST_SOLID)


def _key(blocks: Sequence[UnitState]) -> Markup:
    items = []
    for n, block in enumerate(blocks):
        sample = Markup(
            f'<svg class="sample" aria-hidden="true"><path class="{_look(n, len(blocks))}" d="M0 5H26"/></svg>'
        )
        items.append(tag("li", sample, block.name, data_s=f"b{n}"))
    return tag("ul", *items, class_="legend many" if len(blocks) > MOST_SOLID else "legend")


def _small(index: int, block: UnitState, x: Axis, y: Axis) -> Markup:
    use = f'<use href="#c{index}"/>'
    change = f"{show(block.first_error, '{:.3g}')} to {show(block.last_error, '{:.3g}')}"
    label = f"{block.name}: {change}, {show_count(block.steps, 'step')}"
    drawing = chart(stretched(use), x, y, label=label, x_title="", y_title="", ticks=(3, 4))
    bad = "" if block.status in ("finished", "training") else f" {block.status}"
    caption = tag("figcaption", tag("b", block.name), f" {change}", tag("strong", bad) if bad else Markup())
    return tag("figure", caption, drawing)


def courses(run: Run) -> Markup:
    """Return the loss by epoch of the teacher (where the job trained it) and of fine-tuning, and validation accuracy by
    epoch of the latter with the epoch that was kept; nothing where neither was trained."""
    teacher = run.stages.get("teacher") or {}
    finetune = run.stages.get("finetune") or run.part("finetune")
    plots = [
        *_losses("Training the teacher", _values(teacher, "loss")),
        *_losses("Fine-tuning", _values(finetune, "loss")),
        *_accuracies(run, finetune),
    ]
    return tag("div", *plots, class_="pair") if plots else Markup()


def _values(record: Mapping[str, Any], key: str) -> Course:
    return [
        (int(epoch["epoch"]), float(epoch[key]))
        for epoch in record.get("epochs") or []
        if finite(epoch.get(key)) is not None
    ]


def _losses(title: str, course: Course) -> list[Markup]:
    if not course:
        return []
    y = Axis.around((loss for _, loss in course), zero=True)
    label = f"{title}: loss from {course[0][1]:.3g} to {course[-1][1]:.3g} in {show_count(len(course), 'epoch')}"
    words = f" {course[0][1]:.3g} to {course[-1][1]:.3g}"
    return [_course(f"{title}, loss", words, course, y, name="loss", label=label, y_title="loss, mean of the epoch")]


def _accuracies(run: Run, record: Mapping[str, Any]) -> list[Markup]:
    """Epoch 0 is the student that fine-tuning began with, where the run went on to the end."""
    course = _values(record, "validation_top1")
    if not course:
        return []
    known = ((run.metrics.get("student") or {}).get("validation") or {}).get("top1") or {}
    start = finite(known.get("refined", known.get("recalibrated")))
    course = [*([(0, start)] if start is not None else []), *course]
    values, kept = dict(course), record.get("kept_epoch")
    y = Axis.around(values.values())
    title = "Fine-tuning, validation accuracy"
    label = f"{title}: top-1 from {course[0][1]:.2f} % to {course[-1][1]:.2f} %"
    words, mark = f" {course[0][1]:.2f} % to {course[-1][1]:.2f} %", Markup()
    if kept in values:
        x = _epochs(course)
        text = f"epoch {kept} is kept, {values[kept]:.2f} %"
        mark = point(x.at(kept), y.at(values[kept]), kind="kept", title=text, text="kept")
        words += f"; {text}"
    return [_course(title, words, course, y, name="top-1, %", label=label, y_title="top-1, %", above=mark)]


def _epochs(course: Course) -> Axis:
    return Axis.around((epoch for epoch, _ in course), zero=True, whole=True)


def _course(
    title: str, words: str, course: Course, y: Axis, *, name: str, label: str, y_title: str, above: str = ""
) -> Markup:
    x = _epochs(course)
    dots = "".join(
        f'<circle class="dot" cx="{100 * x.at(epoch):.2f}%" cy="{100 * (1 - y.at(value)):.2f}%" r="3"/>'
        for epoch, value in course[:MOST_DOTS]
    )
    line = stretched(f'<path class="line solo" data-name="{escape(name)}" d="{curve(course, x, y)}"/>')
    drawing = chart(join(line, Markup(dots), above), x, y, label=label, x_title="epoch", y_title=y_title)
    return tag("figure", tag("figcaption", tag("b", title), words), drawing)
