"""The page and the table that compare several runs, also where some of them failed or are not there."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group
from rich.table import Table

from distill.observability.numbers import show, show_count, show_short
from distill.reporting.compared_runs import SAME_JOB, Line, compared
from distill.reporting.front import FRONT_NOTE, front_charts, measured
from distill.reporting.latency import runtime_words
from distill.reporting.markup import Markup, join, laid_out, section, table, tag
from distill.reporting.page import document
from distill.reporting.plot import Axis, chart, point
from distill.storage.files import write_text

WORDS = (0, 1, 2)  # columns that are not numbers
# The figures on a terminal; the page has all.
SHOWN = ("ranks", "top-1", "to\nteacher", "params", "FLOP", "ms of\n1 image", "ms of\n64 images", "distill", "speed-up",
         "energy")  # fmt: skip


def comparison_table(run_dirs: Sequence[Path]) -> Group:
    """Return the runs in the given order, by number: what each is, then its figures. A run that failed or is missing
    says so. Fits 100 columns."""
    found, base = compared(run_dirs)
    what = Table(title=show_count(len(found), "run"), title_justify="left", box=None)
    for heading in ("run", "what differs", "state"):
        what.add_column(heading, overflow="fold")
    figures = Table(caption=_caption(found, base), caption_justify="left", box=None)
    for heading in ("run", *SHOWN):
        figures.add_column(heading, justify="right", overflow="fold")
    for line in found:
        what.add_row(*line.cells()[: len(WORDS)])
        figures.add_row(str(line.number), *(line.figures()[heading] for heading in SHOWN))
    return Group(what, "", figures)


def _caption(lines: Sequence[Line], base: str) -> str:
    """Say what the figures are."""
    words = (
        f"params, FLOP (of an image, 2 per multiply-add) and ms are the student's, {_latencies(lines)}; distill: "
        "seconds of that stage"
    )
    return f"{words}; speed-up {' '.join(base.split())}" if base else words


def _latencies(lines: Sequence[Line]) -> str:
    """Say in what latencies were measured."""
    finished = [line for line in lines if line.run is not None and line.run.finished]
    if not finished or finished[0].eager:
        return "ms in eager PyTorch"
    places: dict[str, list[str]] = defaultdict(list)
    for line in finished:
        places[runtime_words(line.run.metrics) if line.run is not None else ""].append(str(line.number))
    if len(places) == 1:
        return f"ms in {next(iter(places))}"
    told = (f"{words}: {', '.join(numbers)}" for words, numbers in places.items())
    return f"ms of different places, not to be compared ({'; '.join(told)})"


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Draw the page that compares these runs; return `path`."""
    found, base = compared(run_dirs)
    finished = sum(line.run is not None and line.run.finished for line in found)
    title = f"{show_count(len(found), 'run')} compared"
    heading = join(tag("h1", title), tag("p", _best(found) or "No run has a student yet.", class_="lead"))
    rows, scatters = [_linked(line, path) for line in found], _scatters(found)
    note = f"{finished} of {show_count(len(found), 'run')} finished; {_latencies(found)}."
    write_text(
        path,
        document(
            title,
            heading,
            laid_out([
                section("Runs", table(_headings(base), rows, text=WORDS, long=1, kind="sorts"), note=note),
                section("Accuracy against latency", _fronts(found),
                        note=f"{FRONT_NOTE} Numbers are those of the table."),
                section("Accuracy against other prices", tag("div", *scatters, class_="pair") if scatters else Markup(),
                        note="Numbers are those of the table; rings are the teachers."),
                section("Speed-up against ranks", _speed_ups(found) if base == SAME_JOB else Markup(),
                        note="Of the distill stage, as in the table. The dashed line is ideal; it is there where all "
                             "jobs start from as many ranks."),
            ]),
            broad=True,
        ),
    )  # fmt: skip
    return path


def _headings(base: str) -> tuple[str, ...]:
    """Return the headings of Line.cells()."""
    figures = (
        f"speed-up {base}".strip() if heading == "speed-up" else heading for heading in Line(0, "", "").figures()
    )
    return ("run", "what differs", "state", *figures)


def _best(lines: Sequence[Line]) -> str:
    """Return in words which run is most accurate and which is smallest."""
    known = [line for line in lines if line.student("top1") is not None]
    if not known:
        return ""
    best = max(known, key=lambda line: line.student("top1") or 0.0)
    size = show_short(best.student("params"))
    text = f"Most accurate: {best.number} ({show(best.student('top1'))} %, {size} parameters)."
    sized = [line for line in known if line.student("params") is not None]
    if len(sized) > 1:
        least = min(sized, key=lambda line: line.student("params") or 0.0)
        text += f" Smallest: {least.number} ({show_short(least.student('params'))}, {show(least.student('top1'))} %)."
    return text


def _linked(line: Line, page: Path) -> tuple[str, ...]:
    """Return a run's cells, the first of them a link to its own page where that lies near."""
    name, *others = line.cells()
    if line.run is None or not (line.run.path / "report.html").exists():
        return (name, *others)
    target = os.path.relpath((line.run.path / "report.html").resolve(), page.resolve().parent)
    return (tag("a", name, href=Path(target).as_posix()), *others)


def _fronts(lines: Sequence[Line]) -> Markup:
    """Return accuracy against latency in every place where some were measured, and what the numbers are."""
    points = []
    for line in lines:
        if line.run is None or not line.run.finished:
            continue
        for one in measured(line.run.metrics):
            precision = "" if one.precision == "fp32" else f", {one.precision}"
            words = f"{line.title}{precision}. {line.differs}".strip()
            name = one.name if one.teacher else f"{line.number}{precision}"
            series = "" if one.teacher else f"r{line.number}"
            points.append(one if one.teacher else replace(one, name=name, words=words, series=series))
    shown = {one.series for one in points}
    entries = [
        tag("li", tag("b", str(line.number)), line.differs or line.name, data_s=f"r{line.number}")
        for line in lines
        if f"r{line.number}" in shown
    ]
    return join(tag("ul", *entries, class_="legend"), front_charts(points)) if entries else Markup()


def _scatters(lines: Sequence[Line]) -> list[Markup]:
    prices: tuple[tuple[str, str, Callable[[Line], float | None], Callable[[Line], float | None]], ...] = (
        ("parameters", "parameters, logarithmic", lambda run: run.student("params"), lambda run: run.teacher("params")),
        ("FLOPs", "FLOP per image, logarithmic", lambda run: run.student("flops"), lambda run: run.teacher("flops")),
        ("seconds", "seconds of the distill stage, logarithmic", lambda run: run.seconds, lambda run: None),
    )  # fmt: skip
    return [plot for name, x_title, price, full in prices if (plot := _scatter(lines, name, x_title, price, full))]


def _scatter(
    lines: Sequence[Line],
    name: str,
    x_title: str,
    price: Callable[[Line], float | None],
    full: Callable[[Line], float | None],
) -> Markup:
    students = [(x, y, line) for line in lines if (x := price(line)) and (y := line.student("top1")) is not None]
    teachers = {(x, y) for line in lines if (x := full(line)) and (y := line.teacher("top1")) is not None}
    if not students:
        return Markup()
    x_axis = Axis.around([x for x, *_ in students] + [x for x, _ in teachers], log=True)
    y_axis = Axis.around([y for _, y, _ in students] + [y for _, y in teachers])
    dots = [point(x_axis.at(x), y_axis.at(y), kind="reference", title=f"teacher: {y:.2f} %, {show_short(x)}")
            for x, y in sorted(teachers)]  # fmt: skip
    places = [(x_axis.at(x), y_axis.at(y)) for x, y, _ in students]
    for n, (x, y, line) in enumerate(students):
        words = f"{line.number} {line.name}: {y:.2f} %, {show_short(x)} {name}. {line.differs}"
        near = [m for m, (a, b) in enumerate(places) if abs(a - places[n][0]) < 0.05 and abs(b - places[n][1]) < 0.08]
        text = (
            ", ".join(str(students[m][2].number) for m in near) if near[0] == n else ""
        )  # one label for what overlaps
        dots.append(point(*places[n], kind="run", title=words, text=text, series=f"r{line.number}"))
    label = f"top-1 accuracy against {name} of {show_count(len(students), 'run')}"
    drawing = chart(join(*dots), x_axis, y_axis, label=label, x_title=x_title, y_title="top-1 accuracy, %")
    return tag("figure", tag("figcaption", tag("b", f"Accuracy against {name}")), drawing)


def _speed_ups(lines: Sequence[Line]) -> Markup:
    known = [(line.ranks, line.speed_up, line) for line in lines if line.ranks and line.speed_up is not None]
    if len({ranks for ranks, _, _ in known}) < 2:
        return Markup()
    most = max(ranks for ranks, _, _ in known)
    x, y = Axis.around([most], zero=True, whole=True), Axis.around([max(up for _, up, _ in known), 1.0], zero=True)
    ideal = ""
    if len(bases := {ranks for ranks, up, _ in known if up == 1.0}) == 1:
        base = bases.pop()
        reach = min(x.high, y.high * base)
        ideal = (f'<line class="ideal" x1="0" y1="100%" x2="{100 * x.at(reach):.2f}%" '
                 f'y2="{100 * (1 - y.at(reach / base)):.2f}%"/>')  # fmt: skip
    dots = [
        point(x.at(ranks), y.at(up), kind="run", text=str(line.number),
              title=f"{line.number} {line.name}: {up:.2f}x on {show_count(ranks, 'rank')}")
        for ranks, up, line in known
    ]  # fmt: skip
    label = f"speed-up against ranks of {show_count(len(known), 'run')}, at most {max(up for _, up, _ in known):.2f}"
    return chart(join(Markup(ideal), *dots), x, y, label=label, x_title="ranks", y_title="speed-up", kind="wide")
