"""`distill simulate`: what a run's measured costs would come to on other numbers of ranks and other links. No torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.errors import DistillError
from distill.files import read_json
from distill.network import Link, Network
from distill.plan import Costs, Span
from distill.simulate import Simulation, simulate
from distill.strategies import PLANNERS

FREE = Link()
CHOSEN_FROM = ("broadcast", "relay", "replicate")  # the others exist to be measured against
EPILOG = """\
examples:
  distill simulate outputs/demo/a0c1d91ac40707f4
  distill simulate RUN --ranks 1 4 16 --strategies broadcast relay --gbit 10 --latency-us 50
  distill simulate RUN --speed 30          ranks thirty times as fast as those of the run

The run must have a plan (stage=plan is enough). Every strategy gets its best plan for each number of ranks, and that is
played through on a simulated clock. All ranks are alike, links are as given."""


def main(arguments: Sequence[str]) -> int:
    """Run `distill simulate`; return the exit status: 0, or 2 after an error that has been told in one line."""
    parser = argparse.ArgumentParser(
        prog="distill simulate",
        description="Simulate a run on other clusters, from the costs it has measured.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory with a plan")
    parser.add_argument("--ranks", type=_at_least_one, nargs="+", default=[1, 2, 4, 8], help="numbers of ranks")
    parser.add_argument("--strategies", nargs="+", choices=PLANNERS, default=list(CHOSEN_FROM))
    parser.add_argument("--gbit", type=_positive, help="bandwidth of a rank's link in Gbit/s (default: no limit)")
    parser.add_argument("--latency-us", type=float, default=0.0, help="latency of a link in microseconds")
    parser.add_argument("--speed", type=_positive, default=1.0, help="speed of a rank, that of the run's ranks being 1")
    parser.add_argument("--steps", type=_at_least_one, help="steps of every block (default: as the run has it)")
    options = parser.parse_args(arguments)
    try:
        link = Link(options.gbit * 1e9 / 8 if options.gbit else float("inf"), options.latency_us * 1e-6)
        costs, spans = measured(options.run, link=link, speed=options.speed, steps=options.steps)
    except DistillError as error:
        sys.stderr.write(f"distill simulate: {error}\n")
        return 2
    found = [
        simulate(PLANNERS[name](costs, spans, ranks), costs) for ranks in options.ranks for name in options.strategies
    ]
    alone = simulate(PLANNERS["broadcast"](costs, spans, 1), costs)
    Console(width=None if sys.stdout.isatty() else 120).print(forecast_table(found, alone))
    return 0


def measured(run_dir: Path, *, link: Link = FREE, speed: float, steps: int | None) -> tuple[Costs, list[Span]]:
    """Return the costs that a run has measured, for ranks `speed` times as fast on such links, and all of its blocks
    from step 0.

    Raises DistillError where the directory holds no plan, or one of an older version.
    """
    costs: Any = read_json(run_dir / "costs.json")
    plan: Any = read_json(run_dir / "plan.json")
    if costs is None or plan is None:
        raise DistillError(f"{run_dir}: no plan is there; expected a run directory (python -m distill stage=plan ...)")
    if "boundary_bytes" not in costs:
        raise DistillError(
            f"{run_dir}/costs.json: written by an older version; plan again (stage=plan run.dir=NEW ...)"
        )
    students = [block for block, seconds in enumerate(costs["seconds"]["student"]) if seconds > 0]
    budget = steps or max((span["budget"] for span in plan["spans"]), default=1)
    return (
        Costs(
            tuple(seconds / speed for seconds in costs["seconds"]["teacher"]),
            tuple(seconds / speed for seconds in costs["seconds"]["student"]),
            tuple(costs["boundary_bytes"]),
            student_bytes=tuple(costs["student_bytes"]),
            network=Network(within=replace(link, sender_s_per_byte=costs["sender_s_per_byte"] / speed)),
        ),
        [Span(block, 0, budget) for block in students],
    )


def forecast_table(found: Sequence[Simulation], alone: Simulation) -> Table:
    """Return one line a simulation; speed-ups are over `alone`, one rank that shares one teacher pass."""
    table = Table(title="simulated", title_justify="left", box=None)
    for heading in ("ranks", "strategy", "seconds", "speed-up", "efficiency", "idle", "GB sent", "teacher passes"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    best = {
        ranks: min(one.makespan_s for one in found if one.plan.world_size == ranks)
        for ranks in {one.plan.world_size for one in found}
    }
    for one in found:
        ranks = one.plan.world_size
        speed_up = alone.makespan_s / one.makespan_s if one.makespan_s else 0.0
        mark = "bold" if one.makespan_s == best[ranks] else ""
        table.add_row(
            str(ranks), one.plan.strategy, f"{one.makespan_s:,.1f}", f"{speed_up:.2f}x",
            f"{100 * speed_up / ranks:.1f} %", f"{100 * one.mean_idle_share:.1f} %", f"{one.bytes_sent / 1e9:.2f}",
            f"{one.teacher_passes:,.0f}", style=mark,
        )  # fmt: skip
    return table


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer >= 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number > 0")
    return value
