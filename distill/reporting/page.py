"""The page of one run: what a reader wants first comes first. Self-contained: nothing is fetched, and its policy lets
nothing else run or be loaded than the one script and style sheet that are in it."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from distill.observability.numbers import show, show_seconds
from distill.reporting.answers import answers_section
from distill.reporting.courses import block_curves, courses
from distill.reporting.energy import energy_section
from distill.reporting.front import FRONT_NOTE, front_of_run
from distill.reporting.headline import headline, what_stopped
from distill.reporting.latency import int8_section, latency_section, runtime_words
from distill.reporting.markup import Markup, facts, folded, join, laid_out, section, table, tag
from distill.reporting.predictions import predictions
from distill.reporting.run import Run
from distill.reporting.script import SCRIPT
from distill.reporting.search import search_section
from distill.reporting.style import STYLE
from distill.reporting.tables import result_rows
from distill.reporting.timeline import time_line
from distill.storage.files import write_text

log = logging.getLogger(__name__)


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Draw a run's page from its directory, whatever is there yet; return its path (report.html in the directory).

    Raises NoRunError where no run is.
    """
    run = Run(run_dir)
    path = path or run_dir / "report.html"
    write_text(path, document(run.title, run_page(run)))
    for damage in run.damaged:
        log.warning("report: left out: %s", damage)
    return path


def document(title: str, *content: str, broad: bool = False) -> str:
    """Return a whole page; a `broad` one uses more of a wide screen."""
    head = join(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Markup('<link rel="icon" href="data:,">'),  # else a browser asks the server for one
        tag("title", title),
        Markup(f"<style>{STYLE}</style>"),
    )
    body = tag("main", *content, class_="broad" if broad else None)
    script = Markup(f"<script>{SCRIPT}</script>")
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}{script}</body></html>\n'


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_sha256(SCRIPT)}; style-src {_sha256(STYLE)}; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def run_page(run: Run) -> Markup:
    """Return the sections of a run's page, those left out that its directory has nothing for."""
    metrics = run.metrics
    results = table(("", "teacher", "student", "ratio"), result_rows(metrics)) if run.finished else Markup()
    top, stopped = headline(run), what_stopped(run)
    sections = [
        section("Teacher against student", results, note="FLOPs count 2 per multiply-add; accuracy on the test split."),
        section("Latency", latency_section(metrics),
                note=f"In {runtime_words(metrics)}, both networks in turn, round after round."),
        section("Accuracy against latency", front_of_run(metrics) if run.finished else Markup(), note=FRONT_NOTE),
        section("In INT8", int8_section(metrics),
                note="Quantised by training images after distillation, and timed in turn in ONNX Runtime."),
        section("Answers, class by class", answers_section(metrics),
                note="First guesses of the teacher and of the delivered student on the test split."),
        section("Chosen under budgets", search_section(metrics),
                note="Candidates were scored without training, one at a time in the teacher, on validation images."),
        section("Exports", _exports(metrics.get("exports")),
                note="Each file was loaded afresh and compared with the network that it is made from."),
        section("Errors of the blocks", block_curves(run),
                note="Every block learns alone to give the teacher's output; all plots share one scale."),
        section("What the ranks did", time_line(run), note="The distill stage, by each host's own clock."),
        section("Predicted against measured", predictions(run),
                note="Predictions were made before training; a block's measured step is its mean over the training."),
        section("Energy", energy_section(run)),
        section("Courses of the whole networks", courses(run)),
        section("Ledger", _ledger(run)),
        section("Run", facts(_run_facts(run))),
        section("Configuration", folded("Every setting, as it was resolved", tag("pre", run.settings_text, tabindex=0))
                if run.settings_text else Markup()),
    ]  # fmt: skip
    # Only now is it known what could not be read.
    damaged = tag("pre", "\n".join(run.damaged)) if run.damaged else Markup()
    return join(top, laid_out([*stopped, section("Damaged files, left out", damaged), *sections]))


def _exports(exports: Any) -> Markup:
    if not isinstance(exports, dict) or not exports:
        return Markup()
    rows = []
    for name, export in exports.items():
        found = export if isinstance(export, dict) else {}
        rows.append(
            (name, str(found.get("file") or "-"), str(found.get("status", "-")),
             show(found.get("max_abs_difference"), "{:.2g}"),
             show(found.get("top1_agreement"), "{:.2f} %"),
             show(found.get("images"), "{:,.0f}"), str(found.get("reason") or ""))
        )  # fmt: skip
    headings = ("format", "file", "status", "largest difference", "top-1 agreement", "images", "")
    return table(headings, rows, text=(0, 1, 2, 6))


def _ledger(run: Run) -> Markup:
    rows = [
        (b.name, str(b.rank), b.status, f"{b.steps:,}", show(b.first_error, "{:.4f}"), show(b.last_error, "{:.4f}"),
         show_seconds(b.seconds), show_seconds(b.entry.get("finished_at_s")), str(b.entry.get("generation", "-")),
         str(b.entry.get("sha256", ""))[:12])
        for b in run.units if b.entry is not None
    ]  # fmt: skip
    headings = (
        "block",
        "rank",
        "state",
        "steps",
        "first error",
        "last error",
        "training",
        "finished at",
        "attempt",
        "sha256",
    )
    return table(headings, rows, text=(0, 2, 9), tall=True, kind="sorts") if rows else Markup()


def _taken(run: Run) -> list[tuple[str, Any]]:
    """What was not computed by this run, and which run computed it."""
    teacher, figures = (run.stages.get(stage, {}).get("taken_from") for stage in ("teacher", "distill"))
    sources = Counter(block.entry["source"] for block in run.units if block.entry and block.entry.get("source"))
    blocks = "; ".join(f"{count} of {len(run.units)} trained by run {name}" for name, count in sources.items())
    return [
        ("teacher, taken over", f"trained by run {teacher}" if teacher else None),
        ("blocks, taken over", blocks or None),
        ("figures of the distill stage", f"those of run {figures}" if figures else None),
    ]


def _run_facts(run: Run) -> list[tuple[str, str]]:
    distill, data, metrics = run.part("distill"), run.metrics.get("data") or {}, run.metrics
    skipped, made = data.get("skipped_images") or [], metrics.get("run") or {}
    known: list[tuple[str, Any]] = [
        ("run directory", run.path.resolve()),
        ("fingerprint", metrics.get("fingerprint")),
        ("seed", metrics.get("seed", run.settings.get("seed"))),
        ("attempts", run.attempts),
        ("strategy", distill.get("strategy", run.plan.get("strategy"))),
        ("ranks", run.world_size),
        ("ranks that run the teacher", ", ".join(map(str, distill.get("teaching_ranks") or [])) or None),
        ("ranks that share batches", "; ".join(", ".join(map(str, g)) for g in distill.get("groups") or []) or None),
        ("threads per rank", distill.get("threads_per_rank")),
        ("distill stage", "resumed: its figures are of the last attempt" if distill.get("resumed") else None),
        *_taken(run),
        ("teacher passes", show(distill.get("teacher_passes"), "{:,.0f}")),
        ("teacher seconds", show_seconds(distill.get("teacher_seconds"))),
        ("CPU seconds, all ranks", show(distill.get("cpu_seconds"), "{:,.1f}")),
        ("sent to other ranks", show((distill.get("bytes_sent") or 0) / 1e6, "{:,.1f} MB") if distill else None),
        ("images", ", ".join(f"{data[f'{name}_images']:,} {name}" for name in ("train", "validation", "test")
                             if isinstance(data.get(f"{name}_images"), int)) or None),
        ("images passed over", ", ".join(map(str, skipped)) if skipped else None),
        *((name.replace("_", " "), made.get(name)) for name in ("command", "started_at", "finished_at")),
        *(metrics.get("environment") or {}).items(),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in known if value not in (None, "-")]
