"""Efficiency against the number of ranks, as an SVG file that stands alone. Knows nothing of plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.errors import DistillError
from distill.reporting.markup import Markup, escape, tag
from distill.reporting.plot import Axis, axes, point
from distill.storage.files import write_text

COLOURS = ("#2f6fb5", "#2f9e6e", "#c8553d", "#7d3cc8", "#8a5200", "#4f7f8f")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 4", "1 2")
SIZE, PLOT = (820, 460), (70, 64, 600, 320)  # width and height of the page; left, top, width, height of the plot
STYLE = """
svg { font: 13px system-ui, "Segoe UI", Roboto, Arial, sans-serif; } .paper { fill: #fff; }
text { fill: #565d67; } text.heading { fill: #1a1d21; font-weight: 600; font-size: 16px; }
text.y { text-anchor: end; } text.x { text-anchor: middle; } text.title { text-anchor: end; }
.grid { stroke: #e6e9ed; } .axis, .tick { stroke: #565d67; stroke-opacity: .6; }
polyline, line.sample { fill: none; stroke-width: 2; stroke-linejoin: round; }
"""

Curve = Sequence[tuple[int, float]]


def write_scaling(path: Path, curves: Mapping[str, Curve], *, title: str) -> None:
    """Write the drawing of named curves of (ranks, efficiency). Raises DistillError where it cannot be written."""
    if path.suffix != ".svg":
        raise DistillError(f"--plot {path}: expected a name that ends in .svg")
    try:
        write_text(path, str(scaling(curves, title=title)))
    except OSError as error:
        raise DistillError(f"--plot {path}: {error.strerror}") from error


def scaling(curves: Mapping[str, Curve], *, title: str) -> Markup:
    """Return the drawing: ranks along a logarithmic axis, speed-up by rank upwards, a legend with the last values."""
    ranks = sorted({number for curve in curves.values() for number, _ in curve})
    x = Axis(ranks[0], max(ranks[-1], ranks[0] + 1), log=True)
    y = Axis(0.0, max(1.0, *(value for curve in curves.values() for _, value in curve)))
    left, top, width, height = PLOT
    frame = axes(x, y, ranks, Axis(0.0, y.high).ticks(6), "ranks")
    drawn = [
        _curve(sorted(curve), x, y, name=name, colour=COLOURS[index % 6], dash=DASHES[index % 6])
        for index, (name, curve) in enumerate(curves.items())
    ]
    plot = tag("svg", frame, *drawn, x=left, y=top, width=width, height=height, overflow="visible")
    heading = f'<text class="heading" x="{left - 46}" y="26">{escape(title)}</text>'
    heading += f'<text x="{left - 46}" y="48">efficiency: speed-up over one rank, by the number of ranks</text>'
    entries = "".join(_entry(index, name, sorted(curve)[-1]) for index, (name, curve) in enumerate(curves.items()))
    paper = '<rect class="paper" width="100%" height="100%"/>'
    inside = Markup(f"<style>{STYLE}</style>{paper}{heading}{plot}{entries}")
    box = f"0 0 {SIZE[0]} {SIZE[1]}"
    return tag("svg", inside, xmlns="http://www.w3.org/2000/svg", viewBox=box, width=SIZE[0], height=SIZE[1])


def _curve(curve: Curve, x: Axis, y: Axis, *, name: str, colour: str, dash: str) -> Markup:
    width, height = PLOT[2:]
    places = [(x.at(ranks), y.at(value)) for ranks, value in curve]
    corners = " ".join(f"{width * across:.1f},{height * (1 - up):.1f}" for across, up in places)
    dots = [
        point(across, up, kind="dot", title=f"{name}, {ranks} ranks: {value:.3f}")
        for (across, up), (ranks, value) in zip(places, curve, strict=True)
    ]
    line = f'<polyline points="{corners}" stroke="{colour}" stroke-dasharray="{dash}"/>'
    return tag("g", Markup(line), *dots, fill=colour)


def _entry(index: int, name: str, last: tuple[int, float]) -> str:
    left, top = PLOT[0] + PLOT[2] + 20, PLOT[1] + 10 + 40 * index
    colour, dash = COLOURS[index % 6], DASHES[index % 6]
    sample = f'<line class="sample" x1="{left}" x2="{left + 30}" y1="{top}" y2="{top}" '
    sample += f'stroke="{colour}" stroke-dasharray="{dash}"/>'
    return (
        f'{sample}<text x="{left + 38}" y="{top}" dy=".35em">{escape(name)}</text>'
        f'<text x="{left + 38}" y="{top + 16}" dy=".35em">{last[1]:.2f} at {last[0]}</text>'
    )
