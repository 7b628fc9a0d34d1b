"""`distill report`: draws the page of a run again, or compares several, from their files alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.errors import DistillError
from distill.reporting.comparison import comparison_table, write_comparison
from distill.reporting.console import console
from distill.reporting.page import write_report
from distill.reporting.run import EXPECTED, NoRunError, is_run, runs_below

EPILOG = """\
examples:
  distill report outputs/demo/700b8f7af7f7d2c2      that run's report.html, drawn again
  distill report outputs/demo                       all runs below, compared in comparison.html
  distill report run1 run2 --output compared.html   two runs, compared

A run may be unfinished or failed: its page then tells how far it got, its last errors and how to go on.
Nothing is computed and nothing but the page is written; no GPU and no network are needed."""


def main(arguments: Sequence[str]) -> int:
    """Run `distill report`; return the exit status: 0, or 2 after an error that has been told in one line."""
    parser = argparse.ArgumentParser(
        prog="distill report",
        description="Draw a run's page again, or compare several runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="DIR", help=f"{EXPECTED}")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="the page to write (default: report.html in the run directory; comparison.html in the folder that was "
        "given, or here where several were)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        page = _draw(options.paths, options.output)
    except DistillError as error:
        sys.stderr.write(f"distill report: {error}\n")
        return 2
    sys.stdout.write(f"{page}\n")
    return 0


def _draw(paths: Sequence[Path], output: Path | None) -> Path:
    if output is not None and output.is_dir():
        raise NoRunError(
            f"--output {output}: that is a folder; expected the name of a page, such as {output}/report.html"
        )
    if len(paths) == 1 and is_run(paths[0]):
        return write_report(paths[0], output)
    folders = [path for path in paths if path.suffix != ".html"] or paths  # a glob also finds the pages drawn before
    runs = list(dict.fromkeys(run for path in folders for run in _runs(path)))
    console().print(comparison_table(runs))
    default = (paths[0] if len(paths) == 1 else Path()) / "comparison.html"
    return write_comparison(runs, output or default)


def _runs(path: Path) -> list[Path]:
    runs = runs_below(path)
    if not runs:
        what = "no run is there" if path.exists() else "no such folder"
        raise NoRunError(f"{path}: {what}; expected {EXPECTED}")
    return runs
