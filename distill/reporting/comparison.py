"""Several runs side by side: one table and a few plots, also where some of them failed or are not there."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from distill.observability.energy.joules import job_joules
from distill.observability.numbers import finite, show, show_count, show_seconds, show_short
from distill.reporting.energy import show_joules
from distill.reporting.latency import Speed, in_eager, in_runtime, runtime_words
from distill.reporting.markup import Markup, join, section, table, tag
from distill.reporting.page import document
from distill.reporting.plot import Axis, chart, point
from distill.reporting.run import NoRunError, Run
from distill.reporting.tables import STUDENTS
from distill.storage.files import write_text

# What a speed-up is over, in the lines of its heading.
SAME_JOB, ANY_JOB = "over\nthe fewest ranks\nof the same job", "over\nthe slowest run"
WORDS = (0, 1, 2)  # columns that are not numbers
NOT_TOLD = ("run.", "launch.", "checkpoint.", "distill.log_every", "plan.timeout_s")
MOST_DIFFERENCES = 6
# The figures on a terminal; the page has all.
SHOWN = ("ranks", "top-1", "to\nteacher", "params", "FLOP", "ms of\n1 image", "ms of\n64 images", "distill", "speed-up",
         "energy")  # fmt: skip


@dataclass
class Line:
    """One run of a comparison. `run` is None where there is none; figures are None where they are not known."""

    number: int
    name: str
    state: str
    run: Run | None = None
    differs: str = ""
    speed_up: float | None = None
    eager: bool = True  # whether latencies are those of eager PyTorch

    def student(self, key: str) -> float | None:
        return self._figure("student", key)

    def teacher(self, key: str) -> float | None:
        return self._figure("teacher", key)

    def _figure(self, side: str, key: str) -> float | None:
        return (
            finite((self.run.metrics.get(side) or {}).get(key)) if self.run is not None and self.run.finished else None
        )

    def speed(self, batch: int) -> Speed:
        """Both networks' milliseconds of a batch, in the runtime where all runs have them."""
        metrics = self.run.metrics if self.run is not None and self.run.finished else {}
        known = in_eager(metrics) if self.eager else in_runtime(metrics)
        return next((one for one in known if one.batch == batch), Speed(batch, None, None))

    @property
    def seconds(self) -> float | None:
        """Seconds of the distill stage, where it is complete."""
        return finite(self.run.part("distill").get("seconds")) if self.run is not None else None

    @property
    def ranks(self) -> int | None:
        return self.run.world_size if self.run is not None else None

    @property
    def title(self) -> str:
        return f"{self.number} {self.name}"

    def figures(self) -> dict[str, str]:
        """Return what the tables say of it, by heading."""
        a, b = self.teacher("top1"), self.student("top1")
        distill: dict[str, Any] = self.run.part("distill") if self.run is not None else {}
        stages = self.run.stage_seconds if self.run is not None else {}
        joules = job_joules(self.run.energy) if self.run is not None else None
        return {
            "ranks": "-" if self.ranks is None else str(self.ranks),
            "top-1": show(b, "{:.2f} %"),
            "to\nteacher": "-" if a is None or b is None else f"{b - a:+.2f}",
            "params": show_short(self.student("params")),
            "FLOP": show_short(self.student("flops")),
            "ms of\n1 image": show(self.speed(1).student, "{:.2f}"),
            "ms of\n64 images": show(self.speed(64).student, "{:.1f}"),
            "distill": show_seconds(self.seconds),
            "all\nstages": show_seconds(sum(stages.values()) if stages else None),
            "images/s": show_short(distill.get("images_per_second")),
            "speed-up": "-" if self.speed_up is None else f"{self.speed_up:.2f}x",
            "energy": show_joules(joules) if self.run is not None and self.run.finished else "-",
        }

    def cells(self) -> tuple[str, ...]:
        return (self.title, self.differs or "-", self.state, *self.figures().values())


def comparison_table(run_dirs: Sequence[Path]) -> Group:
    """Return the runs in the given order, by number: what each is, then its figures. A run that failed or is missing
    says so. Fits 100 columns."""
    found, base = _lines(run_dirs)
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
    how = sorted({runtime_words(line.run.metrics) for line in finished if line.run is not None})
    return "ms in eager PyTorch" if not how or finished[0].eager else f"ms in {'; '.join(how)}"


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Draw the page that compares these runs; return `path`."""
    found, base = _lines(run_dirs)
    finished = sum(line.run is not None and line.run.finished for line in found)
    title = f"{show_count(len(found), 'run')} compared"
    heading = join(tag("h1", title), tag("p", _best(found) or "No run has a student yet.", class_="lead"))
    rows = [_linked(line, path) for line in found]
    note = f"{finished} of {show_count(len(found), 'run')} finished; {_latencies(found)}."
    write_text(
        path,
        document(
            title,
            heading,
            section("Runs", table(_headings(base), rows, text=WORDS, long=1), note=note),
            section("Accuracy against its price", tag("div", *_scatters(found), class_="pair"),
                    note="Numbers are those of the table; rings are the teachers."),
            section("Speed-up against ranks", _speed_ups(found) if base == SAME_JOB else Markup(),
                    note="Of the distill stage, as in the table. The dashed line is ideal; it is there where all jobs "
                         "start from as many ranks."),
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


def _lines(run_dirs: Sequence[Path]) -> tuple[list[Line], str]:
    """Return the runs and what their speed-up is over."""
    found = []
    for number, path in enumerate(run_dirs, start=1):
        name = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
        try:
            run = Run(path)
        except NoRunError:
            found.append(Line(number, name, "missing"))
            continue
        delivered = STUDENTS.get(str((run.metrics.get("student") or {}).get("delivered")))
        done = f"finished, {delivered}" if delivered else "finished"
        state = done if run.finished else f"{'failed' if run.errors else 'unfinished'} in {run.current_stage}"
        found.append(Line(number, name, state, run))
    finished = [line for line in found if line.run is not None and line.run.finished]
    for line in found:
        line.eager = not all(in_runtime(one.run.metrics) for one in finished if one.run is not None)
    _tell_differences([line for line in found if line.run is not None])
    return found, _set_speed_ups(found)


def _tell_differences(lines: Iterable[Line]) -> None:
    """Write at every run the settings that are not the same in all."""
    settings = [(line, line.run.settings) for line in lines if line.run is not None and line.run.settings]
    keys = sorted({key for _, one in settings for key in one if not key.startswith(NOT_TOLD)})
    differing = [key for key in keys if len({repr(one.get(key)) for _, one in settings}) > 1]
    for line, one in settings:
        told = [f"{key}={one.get(key)}" for key in differing[:MOST_DIFFERENCES]]
        line.differs = ", ".join(told + ["..."] * (len(differing) > MOST_DIFFERENCES))


def _set_speed_ups(lines: Sequence[Line]) -> str:
    """Give every run its speed-up over the fewest ranks that computed the same (the same fingerprint); where no two
    did, over the slowest run of all. Returns which of the two, in words, or "" where there is none."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line.run is not None and line.seconds:
            groups[str(line.run.metrics.get("fingerprint") or line.name)].append(line)
    alike = [group for group in groups.values() if len(group) > 1]
    measured = [line for group in groups.values() for line in group]
    words = SAME_JOB if alike else ANY_JOB
    if not alike and len(measured) > 1:
        alike = [measured]
    for group in alike:
        slowest = max(group, key=lambda line: line.seconds or 0.0)
        fewest = min(group, key=lambda line: (line.ranks or 1, -(line.seconds or 0.0)))
        base = fewest if words == SAME_JOB else slowest
        for line in group:
            line.speed_up = (base.seconds or 0.0) / (line.seconds or 1.0)
    return words if alike else ""


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


def _scatters(lines: Sequence[Line]) -> list[Markup]:
    prices: tuple[tuple[str, str, Callable[[Line], float | None], Callable[[Line], float | None]], ...] = (
        ("parameters", "parameters, logarithmic", lambda run: run.student("params"), lambda run: run.teacher("params")),
        ("FLOPs", "FLOP per image, logarithmic", lambda run: run.student("flops"), lambda run: run.teacher("flops")),
        ("latency", "ms of one image, logarithmic", lambda run: run.speed(1).student,
         lambda run: run.speed(1).teacher),
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
        dots.append(point(*places[n], kind="run", title=words, text=text))
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
