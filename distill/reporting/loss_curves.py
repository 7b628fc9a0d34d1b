"""How errors and losses fell: every block's relative error by step, the teacher's and the student's loss by epoch."""

from __future__ import annotations

from collections.abc import Sequence

from distill.observability.numbers import finite, show, show_count
from distill.reporting.markup import Markup, folded, join, tag
from distill.reporting.plot import Axis, chart, curve, stretched, tick_label
from distill.reporting.run import Run, UnitState

POINTS_IN_ALL = 20_000  # of all blocks' curves: about 0.2 MB
MOST_OPEN = 24  # more blocks than this have their own plots folded away
MOST_NAMED = 12  # more curves than this share one legend from first to last


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
        path = curve(block.course, x, y, most=most)
        lines.append(f'<path id="c{n}" class="line" style="{_colour(n, len(blocks))}" d="{path}"/>')
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


def _colour(index: int, number: int) -> str:
    """Say for the style sheet where a block lies between the first and the last; where each has its own entry in the
    legend, every other one is nearer to the ink, so that neighbours differ in more than their hue."""
    shade = ";--share:var(--shade)" if index % 2 and number <= MOST_NAMED else ""
    return f"--p:{100 * index / max(1, number - 1):.0f}%{shade}"


def _key(blocks: Sequence[UnitState]) -> Markup:
    if len(blocks) > MOST_NAMED:
        return tag("p", blocks[0].name, tag("i", class_="ramp"), blocks[-1].name, class_="legend ramped")
    items = [
        tag("li", tag("i", class_="line", style=_colour(n, len(blocks))), block.name) for n, block in enumerate(blocks)
    ]
    return tag("ul", *items, class_="legend")


def _small(index: int, block: UnitState, x: Axis, y: Axis) -> Markup:
    use = f'<use href="#c{index}"/>'
    change = f"{show(block.first_error, '{:.3g}')} to {show(block.last_error, '{:.3g}')}"
    label = f"{block.name}: {change}, {show_count(block.steps, 'step')}"
    drawing = chart(stretched(use), x, y, label=label, x_title="", y_title="", ticks=(3, 4))
    bad = "" if block.status in ("finished", "training") else f" {block.status}"
    caption = tag("figcaption", tag("b", block.name), f" {change}", tag("strong", bad) if bad else Markup())
    return tag("figure", caption, drawing)


def fit_curves(run: Run) -> Markup:
    """Return the loss by epoch of the teacher (where the job trained it) and of fine-tuning."""
    return join(
        *(
            _fit(run, stage, title)
            for stage, title in (("teacher", "Training the teacher"), ("finetune", "Fine-tuning"))
        )
    )


def _fit(run: Run, stage: str, title: str) -> Markup:
    record = run.stages.get(stage) or (run.part(stage) if stage == "finetune" else {})
    epochs = [
        (int(e["epoch"]), float(e["loss"])) for e in record.get("epochs") or [] if finite(e.get("loss")) is not None
    ]
    if not epochs:
        return Markup()
    x = Axis.around((epoch for epoch, _ in epochs), zero=True, whole=True)
    y = Axis.around((loss for _, loss in epochs), zero=True)
    dots = "".join(
        f'<circle class="dot" cx="{100 * x.at(e):.2f}%" cy="{100 * (1 - y.at(v)):.2f}%" r="3"/>'
        for e, v in epochs[:200]
    )
    line = stretched(f'<path class="line solo" d="{curve(epochs, x, y)}"/>')
    label = f"{title}: loss from {epochs[0][1]:.3g} to {epochs[-1][1]:.3g} in {show_count(len(epochs), 'epoch')}"
    drawing = chart(join(line, Markup(dots)), x, y, label=label, x_title="epoch", y_title="loss, mean of the epoch")
    words = f" {epochs[0][1]:.3g} to {epochs[-1][1]:.3g}"
    return tag("figure", tag("figcaption", tag("b", title), words), drawing)
