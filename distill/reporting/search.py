"""What was chosen under budgets, among what, and why: from the section `search` of a run's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.observability.numbers import finite, show, show_count
from distill.reporting.markup import Markup, folded, join, table, tag
from distill.reporting.plot import Axis, chart, point

UNITS = {
    "params": "parameters",
    "flops": "FLOPs of an image",
    "bytes": "bytes",
    "memory": "bytes alive in a call",
    "latency": "ms of a call",
}


def search_section(metrics: Mapping[str, Any]) -> Markup:
    """Return every budget with what was predicted and measured, what blocks became, all candidates as points and as a
    folded table, and the students that were judged."""
    search = _mapping(metrics.get("search"))
    parts = []
    for one in search.get("budgets") or []:
        found = _mapping(one)
        candidates = [_mapping(candidate) for candidate in search.get("candidates") or []]
        teacher = _mapping(search.get("teacher"))
        parts += [
            _amounts(found, teacher),
            _cloud(found, candidates, teacher),
            _blocks(found, candidates),
            _judged(found),
            folded(show_count(len(candidates), "candidate"), _candidates(candidates, teacher)),
        ]
    return join(*parts)


def _amounts(budget: Mapping[str, Any], teacher: Mapping[str, Any]) -> Markup:
    asked, predicted, measured = (_mapping(budget.get(name)) for name in ("budget", "predicted", "measured"))
    rows = [
        (
            words,
            show(teacher.get(name), _form(name)),
            str(_mapping(asked.get(name)).get("asked", "")),
            show(_mapping(asked.get(name)).get("limit"), _form(name)) if name in asked else "",
            show(predicted.get(name), _form(name)),
            show(measured.get(name), _form(name)),
        )
        for name, words in UNITS.items()
        if name in predicted
    ]
    return table(("", "teacher", "budget", "at most", "predicted", "measured"), rows) if rows else Markup()


def _cloud(budget: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any]) -> Markup:
    """Every candidate: what it takes away of the first budget, against what is lost by it."""
    name = next(iter(_mapping(budget.get("budget"))), "params")
    whole, chosen = finite(teacher.get(name)), _mapping(budget.get("chosen"))
    places = []
    for one in candidates:
        more, loss = finite(one.get(name)), finite(one.get("divergence"))
        if whole and more is not None and loss is not None and loss > 0:
            places.append((-100 * more / whole, loss, one))
    if len(places) < 2:
        return Markup()
    x, y = Axis.around([at for at, _, _ in places], zero=True), Axis.around([loss for _, loss, _ in places], log=True)
    dots = []
    for at, loss, one in sorted(places, key=lambda place: _is_chosen(place[2], chosen)):  # the chosen ones on top
        words = f"{one.get('block')}: {one.get('candidate')}, {at:.1f} % less, divergence {loss:.3g}"
        kind = "run" if _is_chosen(one, chosen) else "reference"
        dots.append(point(x.at(at), y.at(loss), kind=kind, title=words))
    label = f"what is lost against what is saved by {show_count(len(places), 'candidate')}"
    saved = f"{UNITS.get(name, name)} saved, % of the teacher's"
    drawing = chart(join(*dots), x, y, label=label, x_title=saved, y_title="divergence of answers, alone")
    caption = "What every candidate saves, against what is lost by it alone; the filled ones were chosen"
    return tag("figure", tag("figcaption", tag("b", caption)), drawing)


def _is_chosen(candidate: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    return all(chosen.get(block) == candidate.get("candidate") for block in _names(candidate))


def _names(candidate: Mapping[str, Any]) -> list[str]:
    """The blocks for which a candidate stands."""
    return [str(name) for name in candidate.get("blocks") or [candidate.get("block")]]


def _blocks(budget: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> Markup:
    scores = {(block, one.get("candidate")): one for one in candidates for block in _names(one)}
    rows = []
    for block, label in _mapping(budget.get("chosen")).items():
        one = scores.get((block, label), {})
        rows.append((block, str(label), *(show(one.get(name), "{:.3g}") for name in ("error", "divergence"))))
    headings = ("block", "becomes", "relative error", "divergence, alone")
    return table(headings, rows, text=(0, 1), tall=True, kind="sorts") if rows else Markup()


def _judged(budget: Mapping[str, Any]) -> Markup:
    rows = []
    for number, one in enumerate(map(_mapping, budget.get("judged") or [])):
        mark = "goes on" if number == budget.get("delivered") else ""
        predicted = _mapping(one.get("predicted")).get("divergence")
        figures = show(predicted, "{:.3g}"), show(one.get("divergence"), "{:.3g}"), show(one.get("top1"), "{:.2f} %")
        rows.append((f"choice {number + 1}", *figures, mark))
    headings = ("put together", "sum of divergences", "divergence", "validation top-1, before the distill stage", "")
    return table(headings, rows, text=(0, 4), kind="sorts") if rows else Markup()


def _candidates(candidates: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any]) -> Markup:
    names = [name for name in UNITS if name in teacher]
    trained = any(one.get("trained_steps") for one in candidates)
    rows = [
        (
            str(one.get("block")),
            str(one.get("candidate")),
            *(show(one.get(name), _form(name)) for name in names),
            *(show(one.get(name), "{:.3g}") for name in ("error", "divergence")),
            *(_training(one) if trained else ()),
        )
        for one in candidates
    ]
    headings = ("block", "candidate", *(f"{UNITS[name]}, more" for name in names), "relative error", "divergence")
    headings += ("before training", "steps", "dropped") if trained else ()
    return table(headings, rows, text=(0, 1), tall=True, kind="sorts")


def _training(candidate: Mapping[str, Any]) -> tuple[str, str, str]:
    """Its divergence before it was trained, for how many steps, and before which round it was dropped."""
    before, dropped = _mapping(candidate.get("before")), _mapping(candidate.get("dropped"))
    steps = show(candidate.get("trained_steps"), "{:.0f}")
    return show(before.get("divergence"), "{:.3g}"), steps, str(dropped.get("stage", ""))


def _form(name: str) -> str:
    return "{:,.3f}" if name == "latency" else "{:,.0f}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
