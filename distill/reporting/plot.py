"""Plots as SVG, whole without a script: axes with ticks, curves, points and bars. Knows nothing of runs.

A plot has a fixed height and takes its place's width: positions along x are percentages and text keeps its size, so
that one drawing reads well on a telephone and on a wide screen. Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from distill.reporting.markup import Markup, escape, join, tag

SPAN = 10_000  # of the inner coordinates, both ways: the script reads values back from them
LETTER = 0.024  # of a plot's width, on a telephone


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic; the ticks of a `whole` one are integers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @staticmethod
    def around(values: Iterable[float], *, log: bool = False, zero: bool = False, whole: bool = False) -> Axis:
        """Return the axis from tick to tick that holds the finite values (and, if asked, zero)."""
        found = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        found += [0.0] if zero and not log else []
        low, high = (min(found), max(found)) if found else (1.0, 10.0)
        if log:
            return Axis(_round_down(low), _round_up(high if high > low else 1.01 * high), log=True)
        step = max(_nice_step((high - low or abs(high) or 1.0) / 4), 1.0 if whole else 0.0)
        first, last = math.floor(low / step), math.ceil(high / step)
        return Axis(step * first, step * max(last, first + 1), whole=whole)

    @property
    def facts(self) -> str:
        """What the page's script needs to turn places into values."""
        return f"{self.low!r} {self.high!r} {'log' if self.log else 'whole' if self.whole else 'linear'}"

    def at(self, value: float) -> float:
        """Return where `value` lies: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Return at most `most` (at least two) round values within the range."""
        if self.log:
            return _log_ticks(self.low, self.high, most)
        step = max(_nice_step((self.high - self.low) / max(1, most - 1) * 0.999), 1.0 if self.whole else 0.0)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * tick for tick in range(first, last + 1)] if last > first else [self.low, self.high]


def _nice_step(least: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least * (1 - 1e-9))


def _round_down(value: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(value))
    return max(factor * power for factor in (0.5, 1, 2, 5) if factor * power <= value * (1 + 1e-9))


def _round_up(value: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(value))
    return min(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, every in ((range(1, 10), 1), ((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6)):
        ticks = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) >= 2 else [low, high]


def tick_label(value: float) -> str:
    """Return a tick's value, short."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e4):
        for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= limit:
                return f"{value / limit:g}{suffix}"
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{round(value, 10):g}"


def curve(points: Sequence[tuple[float, float]], x: Axis, y: Axis, *, most: int = 300) -> str:
    """Return the path of a line through the points in inner coordinates, thinned to about `most` of them.

    Values that cannot be drawn break the line.
    """
    kept = [*points[:-1][:: 1 + len(points) // most], *points[-1:]]
    path, pen = [], "M"
    for step, value in kept:
        if not math.isfinite(value) or (y.log and value <= 0):
            pen = "M"
            continue
        path.append(f"{pen}{SPAN * x.at(step):.0f} {SPAN * (1 - y.at(value)):.0f}")
        pen = "L"
    return "".join(path) + ("h9" if len(path) == 1 else "")


def stretched(content: str, inner: tuple[int, int] = (SPAN, SPAN), **place: object) -> Markup:
    """Return a nested drawing whose inner coordinates (width, height) are stretched over its place."""
    view = f"0 0 {inner[0]} {inner[1]}"
    return tag("svg", Markup(content), class_="marks", viewBox=view, preserveAspectRatio="none", **place)


def chart(
    marks: str,
    x: Axis,
    y: Axis,
    *,
    label: str,
    x_title: str,
    y_title: str,
    ticks: tuple[int, int] = (5, 6),
    kind: str = "",
) -> Markup:
    """Return a plot with both axes; `label` says in words what it shows. `marks` may use percentages."""
    frame = axes(x, y, x.ticks(ticks[0]), y.ticks(ticks[1]), x_title)
    facts = {"data_x": f"{x.facts} {x_title}".strip(), "data_y": y.facts}
    drawing = tag("svg", frame, Markup(marks), class_="plot", role="img", aria_label=label, **facts)
    above = tag("div", y_title, class_="ytitle") if y_title else ""
    return tag("div", above, drawing, class_=f"chart {kind}".strip())


def axes(x: Axis, y: Axis, x_ticks: Sequence[float], y_ticks: Sequence[float], x_title: str) -> Markup:
    """Return the lines and words of both axes, in percentages of the plot."""
    parts: list[str] = []
    for value in y_ticks:
        place = f"{100 * (1 - y.at(value)):.2f}%"
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{place}" y2="{place}"/>')
        parts.append(f'<text class="y" x="-6" y="{place}" dy=".35em">{tick_label(value)}</text>')
    for value in x_ticks:
        place = f"{100 * x.at(value):.2f}%"
        parts.append(f'<line class="tick" x1="{place}" x2="{place}" y1="100%" y2="99%"/>')
        parts.append(f'<text class="x" x="{place}" y="100%" dy="1.3em">{tick_label(value)}</text>')
    parts.append('<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>')
    if x_title:
        parts.append(f'<text class="x title" x="100%" y="100%" dy="2.6em">{escape(x_title)}</text>')
    return Markup("".join(parts))


def point(x: float, y: float, *, kind: str, title: str, text: str = "", series: str = "", line: int = 0) -> Markup:
    """Return a dot at (x, y) of 0 to 1 from the lower left, with words shown on hovering and a short text on the
    side that has room, in the first line above it (or in another one: negative ones are below); `series` is what a
    legend calls it."""
    place = f"{100 * x:.2f}%", f"{100 * (1 - y):.2f}%"
    side = 'dx="5"' if x + LETTER * len(text) < 1.08 else 'dx="-5" text-anchor="end"'
    where = f'x="{place[0]}" y="{place[1]}" {side} dy="{(0.2 if line < 0 else -0.55) - 1.1 * line:.2f}em"'
    beside = f'<text class="mark" {where}>{escape(text)}</text>' if text else ""
    named = f' data-s="{escape(series)}"' if series else ""
    return join(
        Markup(f'<circle class="{kind}" cx="{place[0]}" cy="{place[1]}" r="5"{named}>'
               f"<title>{escape(title)}</title></circle>"),
        Markup(beside),
    )  # fmt: skip


def bar(parts: Sequence[tuple[float, str]], *, whole: float, label: str) -> Markup:
    """Return one horizontal bar of parts (value, kind) laid end to end; `whole` is its full width."""
    edges = [0.0]
    for value, _ in parts:
        edges.append(edges[-1] + max(0.0, value))
    scale = 100 / max(whole, edges[-1], 1e-300)
    drawn = [
        f'<rect class="k {kind}" x="{scale * low:.2f}%" width="{scale * (high - low):.2f}%" height="100%"/>'
        for (low, high), (_, kind) in zip(pairwise(edges), parts, strict=True)
        if high > low
    ]
    track = '<rect class="track" width="100%" height="100%"/>'
    return tag("svg", Markup(track + "".join(drawn)), class_="bar", role="img", aria_label=label)


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Return what every colour (class) means."""
    return tag("ul", *(tag("li", tag("i", class_=kind), text) for kind, text in entries), class_="legend")
