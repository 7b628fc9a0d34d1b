"""Accuracy against measured latency: what was measured in one place stands on one axis, with the front of what nothing
else there beats in both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from distill.observability.numbers import finite, show_count
from distill.reporting.latency import NAMES, Speed, device_of, in_eager, in_runtime, speeds_of
from distill.reporting.markup import Markup, join, tag
from distill.reporting.plot import SPAN, Axis, chart, point, stretched

FRONT_NOTE = (
    "Test accuracy against the measured time of a call. The line is the front: nothing measured in the same place is "
    "both faster and more accurate. Blue rings are teachers; students on the front are filled."
)
SIDES = ("teacher", "student")


@dataclass(frozen=True)
class Place:
    """Where and how a latency was measured; only what has the same place can be compared."""

    runtime: str
    threads: int  # 0 where that is not known
    device: str
    batch: int

    @property
    def words(self) -> str:
        threads = f", {show_count(self.threads, 'thread')}" if self.threads else ""
        return f"{self.runtime}{threads}{f', on {self.device}' if self.device else ''}"

    @property
    def images(self) -> str:
        return Speed(self.batch, None, None).images


@dataclass(frozen=True)
class Measured:
    """A network with its latency in one place and its accuracy on test images. `name` is what its point is called,
    `words` what is told of it."""

    place: Place
    teacher: bool
    precision: str
    ms: float
    top1: float
    name: str
    words: str
    series: str = ""


def measured(metrics: Mapping[str, Any]) -> list[Measured]:
    """Return both networks of a finished run wherever they were measured: the delivered files, in INT8 too, each by its
    own accuracy; of a run without such measurements, the eager networks."""
    latency, int8 = metrics.get("latency") or {}, metrics.get("int8") or {}
    accuracy = {side: finite((metrics.get(side) or {}).get("top1")) for side in SIDES}
    of_int8 = {side: finite((int8.get(side) or {}).get("top1")) for side in SIDES}
    in_int8 = speeds_of(int8.get("latency") or {})
    whole = in_runtime(metrics)
    found = []
    if whole:
        precision = str(latency.get("precision", "fp32"))
        found += _points(latency, whole, of_int8 if precision == "int8" else accuracy, precision)
    else:
        environment = metrics.get("environment") or {}
        where = {"runtime": "torch", "version": environment.get("torch"), "threads": environment.get("threads")}
        found += _points(where | {"cpu": device_of(metrics)}, in_eager(metrics), accuracy, "fp32")
    if in_int8 and latency.get("precision") != "int8":
        found += _points(int8["latency"], in_int8, of_int8, "int8")
    return found


def _points(
    where: Mapping[str, Any], speeds: Iterable[Speed], accuracy: Mapping[str, float | None], precision: str
) -> list[Measured]:
    runtime, threads = str(where.get("runtime")), int(finite(where.get("threads")) or 0)
    words = f"{NAMES.get(runtime, runtime)} {where.get('version') or ''}".strip()
    found = []
    for speed in speeds:
        place = Place(words, threads, str(where.get("gpu") or where.get("cpu") or ""), speed.batch)
        for side in SIDES:
            ms, top1 = getattr(speed, side), accuracy[side]
            if ms is not None and top1 is not None:
                name = side if precision == "fp32" else f"{side}, {precision}"
                one = Measured(place, side == "teacher", precision, ms, top1, name, name)
                found.append(one)
    return found


def front(points: Iterable[Measured]) -> list[Measured]:
    """Return the points that no other one beats, from the fastest to the most accurate: of equally fast ones the more
    accurate, of equally accurate ones the faster."""
    best: list[Measured] = []
    for one in sorted(points, key=lambda one: (one.ms, -one.top1)):
        if not best or one.top1 > best[-1].top1:
            best.append(one)
    return best


def front_of_run(metrics: Mapping[str, Any]) -> Markup:
    """Return the drawings of one run: teacher and student, in INT8 too."""
    return front_charts(measured(metrics))


def front_charts(points: Sequence[Measured]) -> Markup:
    """Return a drawing for every place and batch, those of one place under a heading that says where it is."""
    groups: dict[str, dict[Place, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for one in points:
        groups[one.place.words][one.place].append(one)
    parts = []
    for words, places in groups.items():
        drawn = [_chart(place, _merged(some)) for place, some in sorted(places.items(), key=lambda item: item[0].batch)]
        parts.append(tag("h3", f"In {words}"))
        parts.append(tag("div", *drawn, class_="pair"))
    return join(*parts)


def _merged(points: Iterable[Measured]) -> list[Measured]:
    """Return the points with one for a teacher that several runs have measured in the same place."""
    teachers: dict[tuple[str, float], list[Measured]] = defaultdict(list)
    students = []
    for one in points:
        if one.teacher:
            teachers[one.precision, one.top1].append(one)
        else:
            students.append(one)
    merged = []
    for same in teachers.values():
        times = [one.ms for one in same]
        words = f"{same[0].words}, the median of {len(same)} runs" if len(same) > 1 else same[0].words
        merged.append(replace(same[0], ms=median(times), words=words))
    return merged + students


def _chart(place: Place, points: Sequence[Measured]) -> Markup:
    x = Axis.around([one.ms for one in points], log=True)
    y = Axis.around([one.top1 for one in points])
    best = front(points)
    dots, places = [], [(x.at(one.ms), y.at(one.top1)) for one in points]
    for n, one in enumerate(points):
        # One text for what overlaps.
        near = [m for m, (a, b) in enumerate(places) if abs(a - places[n][0]) < 0.05 and abs(b - places[n][1]) < 0.08]
        kind = "reference" if one.teacher else "run" if one in best else "run beaten"
        words = f"{one.words}: {one.top1:.2f} %, {one.ms:.3g} ms"
        text = "; ".join(points[m].name for m in near) if near[0] == n else ""
        dots.append(point(*places[n], kind=kind, title=words, text=text, series=one.series, line=_line(one)))
    label = f"top-1 accuracy against milliseconds of {place.images}, {show_count(len(points), 'network')}"
    drawing = chart(join(_front_line(best, x, y), *dots), x, y, label=label, x_title="ms, logarithmic",
                    y_title="top-1, %")  # fmt: skip
    caption = f" {show_count(len(best), 'network')} of {len(points)} on the front"
    return tag("figure", tag("figcaption", tag("b", place.images), caption), drawing)


def _line(one: Measured) -> int:
    """Return where a point's text stands: teachers' below, those in INT8 one line further off than their fp32 likes."""
    further = int(one.precision == "int8")
    return -1 - further if one.teacher else further


def _front_line(best: Sequence[Measured], x: Axis, y: Axis) -> Markup:
    """From the floor below the fastest, along the highest accuracy that can be had by then, to the right end."""
    corners = [(SPAN * x.at(one.ms), SPAN * (1 - y.at(one.top1))) for one in best]
    path = f"M{corners[0][0]:.0f} {SPAN}V{corners[0][1]:.0f}"
    path += "".join(f"H{across:.0f}V{up:.0f}" for _, (across, up) in pairwise(corners))
    return stretched(f'<path class="front" d="{path}H{SPAN}"/>')
