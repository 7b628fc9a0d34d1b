"""What the ranks did when in the distill stage: shares over the whole stage, its first and last steps in full, and
every rank's totals. Draws what a trace holds; a step that a sampled trace left out is shown as not recorded, never as
idle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distill.observability.numbers import show_count, show_seconds
from distill.observability.trace import RankTrace, TimeSpan
from distill.reporting.markup import Markup, escape, join, table, tag
from distill.reporting.plot import Axis, bar, legend, stretched, tick_label
from distill.reporting.run import Run

TRAINING = ("teacher", "student", "wait")  # what a training thread does; the rest of its time it is idle
BACKGROUND = ("send", "receive", "ledger")
WORDS = {
    "teacher": "teacher forward", "student": "student steps", "wait": "waiting for a batch or a free slot",
    "idle": "idle and other", "send": "sending", "receive": "receiving", "ledger": "ledger (blocks handed over)",
    "unrecorded": "not recorded",
}  # fmt: skip
CELLS_IN_ALL = 4000  # of all ranks' lanes over the whole stage
WIDTH = 1000  # of a lane in a close-up, in inner coordinates
MOST_SPANS = 90  # of one training thread in a close-up, where that leaves two steps
MOST_DRAWN = 1600  # spans of all training threads in one close-up, likewise; of one lane, the shortest are left out
MOST_DETAILED = 6  # ranks; more get one lane each

Lane = tuple[str, int, str, tuple[int, int]]  # name, height in pixels, content, its inner width and height


@dataclass(frozen=True)
class RankTimes:
    """One rank's spans in the distill stage by what they show; seconds are counted from the stage's start."""

    trace: RankTrace
    training: list[TimeSpan]
    background: list[TimeSpan]

    @property
    def rank(self) -> int:
        return self.trace.rank

    def gaps(self) -> list[tuple[float, float]]:
        """Return when the training thread worked on steps that were not recorded, in seconds of the epoch."""
        if not self.trace.steps_skipped:
            return []
        found, before = [], None
        for span in (span for span in self.training if span.step is not None):
            if before is not None and span.step is not None and before.step is not None and span.step > before.step + 1:
                found.append((before.start_s + before.seconds, span.start_s))
            before = span
        return found


def time_line(run: Run) -> Markup:
    """Return the time line of the latest attempt's distill stage, or nothing where no trace was kept."""
    ranks = [_times(trace) for trace in run.traces]
    ranks = [rank for rank in ranks if rank.training]
    if not ranks:
        return Markup()
    start, end = _window(run.traces, ranks)
    whole = tag("figure", tag("figcaption", tag("b", "The whole stage"), " share of each moment by kind"),
                _whole(ranks, start, end))  # fmt: skip
    shown = {span.kind for rank in ranks for span in rank.background}
    kinds = [*TRAINING, "idle", *(kind for kind in BACKGROUND if kind in shown)]
    kinds += ["unrecorded"] if any(rank.gaps() for rank in ranks) else []
    key = legend([(f"k {kind}", WORDS[kind]) for kind in kinds])
    close = tag("div", *_close_ups(ranks, start, end), class_="pair")
    return join(key, whole, close, totals(run, ranks, end - start))


def _times(trace: RankTrace) -> RankTimes:
    """Sort a rank's spans; the training thread is the one that trains students or runs the teacher."""
    work = Counter(span.thread for span in trace.spans if span.kind in ("teacher", "student"))
    main = work.most_common(1)[0][0] if work else None
    training = [span for span in trace.spans if span.thread == main and span.kind in TRAINING]
    return RankTimes(trace, training, [span for span in trace.spans if span.kind in BACKGROUND])


def _window(traces: Sequence[RankTrace], ranks: Sequence[RankTimes]) -> tuple[float, float]:
    """Return when the distill stage began and ended, in seconds of the epoch."""
    stages = [span for trace in traces for span in trace.spans if span.kind == "stage" and span.name == "distill"]
    spans = stages or [span for rank in ranks for span in [*rank.training, *rank.background]]
    return min(span.start_s for span in spans), max(span.start_s + span.seconds for span in spans)


def _whole(ranks: Sequence[RankTimes], start: float, end: float) -> Markup:
    """Return a lane a rank: in every cell of time, how much of what was recorded there went into which kind."""
    cells = min(240, max(50, CELLS_IN_ALL // len(ranks)), *(len(rank.gaps()) or 240 for rank in ranks))
    height = 30 if len(ranks) <= 8 else 18 if len(ranks) <= 16 else 9
    lanes = []
    for rank in ranks:
        shares = _shares(rank, start, end, cells)
        content = "".join(
            _area(shares, level, kind) for level, kind in enumerate(("idle", "wait", "student", "teacher"))
        )
        lanes.append((f"rank {rank.rank}", height, content, (cells, 100)))
    return _lanes(
        lanes,
        Axis(0.0, end - start),
        f"share of time by kind of {show_count(len(ranks), 'rank')} over {end - start:.3g} s",
    )


def _shares(rank: RankTimes, start: float, end: float, cells: int) -> list[tuple[float, float, float, float]]:
    """Return for every cell the cumulated shares (0 to 100) of all, of wait + student + teacher, of student + teacher,
    and of teacher; all zero where nothing was recorded."""
    width = max(end - start, 1e-9) / cells
    spent = {}
    for kind in TRAINING:
        times = ((span.start_s, span.start_s + span.seconds) for span in rank.training if span.kind == kind)
        spent[kind] = _spread(times, start, width, cells)
    gaps = _spread(rank.gaps(), start, width, cells)
    shares = []
    for cell in range(cells):
        recorded = width - min(width, gaps[cell])
        if recorded < 1e-4 * width:
            shares.append((0.0, 0.0, 0.0, 0.0))
            continue
        t, s, w = (100 * spent[kind][cell] / recorded for kind in TRAINING)
        shares.append((100.0, min(100.0, t + s + w), min(100.0, t + s), min(100.0, t)))
    return shares


def _spread(times: Iterable[tuple[float, float]], start: float, width: float, cells: int) -> list[float]:
    """Return the seconds of these times that fall into each cell."""
    found = [0.0] * cells
    for low, high in times:
        first, last = (int((t - start) / width) for t in (low, high))
        for cell in range(max(0, first), min(cells - 1, last) + 1):
            found[cell] += max(0.0, min(high, start + (cell + 1) * width) - max(low, start + cell * width))
    return found


def _area(shares: Sequence[tuple[float, ...]], level: int, kind: str) -> str:
    """Return the area below one level of the cumulated shares, as steps."""
    path, before = ["M0 100"], 100
    for cell, share in enumerate(shares):
        top = 100 - round(share[level])
        if top != before:
            path.append(f"H{cell}V{top}")
            before = top
    return f'<path class="area {kind}" d="{"".join(path)}H{len(shares)}V100z"/>'


def _close_ups(ranks: Sequence[RankTimes], start: float, end: float) -> list[Markup]:
    """Return the first and the last recorded steps with every span."""
    opening = min(ranks, key=lambda rank: rank.training[0].start_s)
    closing = max(ranks, key=lambda rank: rank.training[-1].start_s + rank.training[-1].seconds)
    busiest = max(ranks, key=lambda rank: len(rank.training))
    steps = sorted({span.step for span in busiest.training if span.step is not None})
    if not steps:
        return []
    together = sum(len(rank.training) for rank in ranks)
    most = min(MOST_SPANS * len(steps) // len(busiest.training), MOST_DRAWN * len(steps) // together)
    number = max(2, most)
    first = _consecutive(_steps(opening)[:number])
    last = _consecutive(_steps(closing)[: -number - 1 : -1])
    began = min((s.start_s for rank in ranks for s in rank.training if s.kind != "wait"), default=start)
    early = [s for rank in ranks for s in rank.training if s.step in first and s.start_s < (began + end) / 2]
    late = [span for span in closing.training if span.step in last]
    found = []
    if early:
        window = min(s.start_s for s in early), max(s.start_s + s.seconds for s in opening.training if s.step in first)
        found.append(_close_up(f"The first {len(first)} steps", ranks, start, *window))
    if late and not first & last:
        found.append(_close_up(f"The last {len(last)} steps", ranks, start, min(s.start_s for s in late), end))
    return found


def _steps(rank: RankTimes) -> list[int]:
    return sorted({span.step for span in rank.training if span.step is not None and span.kind != "wait"})


def _consecutive(steps: Sequence[int]) -> set[int]:
    """Return the steps up to the first that was not recorded."""
    gap = next((n for n in range(1, len(steps)) if abs(steps[n] - steps[n - 1]) > 1), len(steps))
    return set(steps[:gap])


def _close_up(title: str, ranks: Sequence[RankTimes], origin: float, low: float, high: float) -> Markup:
    lanes: list[Lane] = []
    detailed = len(ranks) <= MOST_DETAILED
    height = 22 if detailed else 14 if len(ranks) <= 16 else 8
    for rank in ranks:
        spans = [span for span in rank.training if _inside(span, low, high)]
        drawn = [_named(span, low, high) for span in spans] if detailed else [_plain(spans, low, high)]
        gaps = [_blank(*gap, low, high) for gap in rank.gaps() if gap[0] < high and gap[1] > low]
        ground = f'<rect class="k idle" width="{WIDTH}" height="1"/>'
        lanes.append((f"rank {rank.rank}", height, ground + "".join(drawn + gaps), (WIDTH, 1)))
        for kind in BACKGROUND if detailed else ():
            extra = [span for span in rank.background if span.kind == kind and _inside(span, low, high)]
            if extra:
                lanes.append((kind, 9, _plain(extra, low, high), (WIDTH, 1)))
    drawing = _lanes(
        lanes, Axis(low - origin, high - origin), f"{title.lower()} of {show_count(len(ranks), 'rank')}, span by span"
    )
    return tag("figure", tag("figcaption", tag("b", title), f" {show_seconds(high - low)}, span by span"), drawing)


def _inside(span: TimeSpan, low: float, high: float) -> bool:
    return span.start_s < high and span.start_s + span.seconds > low


def _place(begin: float, finish: float, low: float, high: float) -> tuple[float, float]:
    """Return where a span begins in a close-up and how wide it is, in inner coordinates."""
    scale = WIDTH / max(high - low, 1e-9)
    left, right = max(0.0, (begin - low) * scale), min(float(WIDTH), (finish - low) * scale)
    return left, max(0.4, right - left)


def _named(span: TimeSpan, low: float, high: float) -> str:
    left, width = _place(span.start_s, span.start_s + span.seconds, low, high)
    step = "" if span.step is None else f", step {span.step}"
    words = escape(f"{span.kind} {span.name}".strip() + f"{step}, {show_seconds(span.seconds)}")
    return f'<rect class="k {span.kind}" x="{left:.1f}" width="{width:.1f}" height="1"><title>{words}</title></rect>'


def _plain(spans: Sequence[TimeSpan], low: float, high: float) -> str:
    """Return spans without words, one path a kind: for many of them."""
    paths: dict[str, list[str]] = {}
    for span in sorted(spans, key=lambda span: -span.seconds)[:MOST_DRAWN]:
        left, width = _place(span.start_s, span.start_s + span.seconds, low, high)
        paths.setdefault(span.kind, []).append(f"M{left:.1f} 0h{width:.1f}v1h-{width:.1f}z")
    return "".join(f'<path class="k {kind}" d="{"".join(parts)}"/>' for kind, parts in paths.items())


def _blank(begin: float, finish: float, low: float, high: float) -> str:
    left, width = _place(begin, finish, low, high)
    return f'<rect class="k unrecorded" x="{left:.1f}" width="{width:.1f}" height="1"/>'


def _lanes(lanes: Sequence[Lane], x: Axis, label: str) -> Markup:
    """Return lanes below one another, on one time axis."""
    parts, top = [], 0
    each = max(1, -(-len(lanes) // 16))  # names of at most about 16 lanes are written
    for number, (name, height, content, inner) in enumerate(lanes):
        if number:
            top += 3 if height < 12 else 8
        if number % each == 0 or height < 12 <= lanes[0][1]:
            small = " small" if height < 12 else ""
            parts.append(f'<text class="y{small}" x="-6" y="{top + height / 2}" dy=".35em">{escape(name)}</text>')
        track = f'<rect class="lane" y="{top}" width="100%" height="{height}"/>'
        parts.append(track + stretched(content, inner, y=top, height=height))
        top += height
    for value in x.ticks(5):
        place = f"{100 * x.at(value):.2f}%"
        parts.append(f'<line class="tick" x1="{place}" x2="{place}" y1="{top + 3}" y2="{top + 8}"/>')
        parts.append(f'<text class="x" x="{place}" y="{top + 8}" dy="1.1em">{tick_label(value)}</text>')
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{top + 4}" y2="{top + 4}"/>')
    parts.append(f'<text class="x title" x="100%" y="{top + 8}" dy="2.4em">seconds since the stage began</text>')
    drawing = tag("svg", Markup("".join(parts)), class_="plot lanes", role="img", aria_label=label, height=top + 8)
    return tag("div", drawing, class_="chart")


def totals(run: Run, ranks: Sequence[RankTimes], seconds: float) -> Markup:
    """Return on what every rank's training thread spent the stage, over all steps, and its background work."""
    rows = []
    for rank in ranks:
        spent = {kind: rank.trace.totals.get(kind, {}).get("seconds", 0.0) for kind in (*TRAINING, *BACKGROUND)}
        idle = max(0.0, seconds - sum(spent[kind] for kind in TRAINING))
        whole = max(seconds, sum(spent[kind] for kind in TRAINING), 1e-9)
        parts = [*((spent[kind], kind) for kind in TRAINING), (idle, "idle")]
        words = ", ".join(f"{kind} {100 * value / whole:.0f} %" for value, kind in parts)
        shares = [f"{100 * value / whole:.1f} %" if value else "-" for value, _ in parts]
        background = [show_seconds(spent[kind]) if spent[kind] else "-" for kind in BACKGROUND]
        drawn = bar(parts, whole=whole, label=f"rank {rank.rank}: {words}")
        rows.append((f"rank {rank.rank}", drawn, *shares, *background))
    skipped = sum(rank.trace.steps_skipped for rank in ranks)
    note = f"Totals count all steps; the drawings lack {skipped:,} steps, counted over all ranks." if skipped else ""
    headings = (
        "",
        "training thread",
        "teacher",
        "students",
        "waiting",
        "idle, other",
        "sending",
        "receiving",
        "ledger",
    )
    return join(
        table(headings, rows, text=(0, 1), tall=True, kind="sorts"), tag("p", note, class_="note") if note else Markup()
    )
