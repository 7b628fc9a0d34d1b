"""`distill simulate`: what a run's measured costs, or those of described devices, would come to on other clusters. No
torch."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.errors import ConfigError, DistillError
from distill.planning.costs import Costs, Span
from distill.planning.network import Link, Network
from distill.planning.plan import STRATEGIES, Plan, Source
from distill.reporting import console, write_scaling
from distill.simulation.hardware import Cluster, Device, described, load_cluster
from distill.simulation.simulator import Simulation, simulate
from distill.storage.files import DamagedFileError, read_json

CHOSEN_FROM = tuple(name for name, strategy in STRATEGIES.items() if strategy.automatic)
COMPARED = tuple(name for name, strategy in STRATEGIES.items() if strategy.source is not Source.recorded)
ENOUGH = 2  # ranks a block: one that trains it, and one that runs the teacher
IMAGINED = (*CHOSEN_FROM, "groups")  # what sharing out a batch costs is known of described devices alone
CLUSTER = "cluster="
EPILOG = f"""\
examples:
  distill simulate outputs/demo/700b8f7af7f7d2c2
  distill simulate RUN --ranks 1 4 16 --strategies broadcast relay --gbit 10 --latency-us 50
  distill simulate RUN --speed 30          ranks thirty times as fast as those of the run
  distill simulate RUN cluster=dgx_h100    the run's own costs, on that cluster's links
  distill simulate teacher=resnet50 data.image_size=224 cluster=dgx_h100 --ranks 8 64 256 --plot efficiency.svg

A run must have a plan (stage=plan is enough). Without one, group=choice and setting=value describe a job as they do for
python -m distill, and a cluster its devices; only the architecture is built, nothing is downloaded and no data is read.
Clusters: {", ".join(described("cluster"))};
or a file that describes one as those in distill/described do. docs/plan.md says what the model leaves out.

Every strategy gets its best plan for each number of ranks, and that is played through on a simulated clock. All ranks
are alike."""

Named = tuple[str, Simulation]  # with the name of its planner
# From the overrides of a job, a device and a number of steps to costs (without a network) and spans.
Imagine = Callable[[Sequence[str], Device, int | None], tuple[Costs, list[Span]]]


@dataclass(frozen=True)
class Subject:
    """What is simulated: costs and spans, the cluster that they are put on, whether the costs are its devices', and
    what else joins the ranks, in words."""

    costs: Costs
    spans: Sequence[Span]
    cluster: Cluster | None = None
    imagined: bool = False
    links: str = ""

    def on(self, ranks: int) -> Costs:
        """Return the costs with the links of that many ranks."""
        network = self.cluster.network(ranks) if self.cluster else self.costs.network.resized(ranks)
        return replace(self.costs, network=network)

    def joules(self, found: Simulation) -> float | None:
        """Return the energy of all devices, None where they are not described."""
        return self.cluster.device.joules(found.busy_s, found.makespan_s) if self.cluster and self.imagined else None


def main(arguments: Sequence[str], imagine: Imagine) -> int:
    """Run `distill simulate`; return the exit status: 0, or 2 after an error that has been told in one line."""
    options = _parser().parse_args(arguments)
    out = console()
    try:
        subject = _subject(options, imagine)
        out.print(_preamble(subject), soft_wrap=True)
        alone = simulate(STRATEGIES["broadcast"].plan(subject.on(1), subject.spans, 1), subject.on(1))
        found = [
            (name, simulate(planned(name, costs, subject.spans, ranks), costs))
            for ranks in options.ranks
            for costs in [subject.on(ranks)]
            for name in options.strategies or (IMAGINED if subject.imagined else CHOSEN_FROM)
        ]
        out.print(forecast_table(found, alone, [subject.joules(one) for _, one in found]))
        if options.plot:
            write_scaling(options.plot, _curves(found, alone), title=_plot_title(subject))
            out.print(f"plot: {options.plot}", soft_wrap=True)
    except DistillError as error:
        sys.stderr.write(f"distill simulate: {error}\n")
        return 2
    return 0


def planned(name: str, costs: Costs, spans: Sequence[Span], ranks: int) -> Plan:
    """Return a planner's plan for that many ranks that are all alike. Only groups can make use of more than a few a
    block; further ranks are left idle here, not searched."""
    few = ranks if STRATEGIES[name].shares_batches else min(ranks, ENOUGH * len(spans))
    network = replace(costs.network, hosts=costs.network.hosts[:few])
    plan = _plan(name, replace(costs, network=network), tuple(spans), few)
    idle = ranks - few
    return replace(
        plan,
        owners=plan.owners + ((),) * idle,
        predicted_rank_s=plan.predicted_rank_s + (0.0,) * idle,
        starts=plan.starts + (plan.starts[-1],) * idle if plan.starts else (),
    )


@cache
def _plan(name: str, costs: Costs, spans: tuple[Span, ...], ranks: int) -> Plan:
    return STRATEGIES[name].plan(costs, spans, ranks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill simulate",
        description="Simulate a job on other clusters, from costs that a run has measured or from described devices.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "subject",
        nargs="+",
        metavar="RUN or SETTING=VALUE",
        help="a run directory with a plan, or a job, then cluster=NAME",
    )
    parser.add_argument(
        "--ranks", type=_at_least_one, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of ranks"
    )
    parser.add_argument(
        "--strategies", nargs="+", choices=COMPARED, metavar="NAME",
        help=f"of {', '.join(COMPARED)} (default: {' '.join(CHOSEN_FROM)}, of described devices also groups)",
    )  # fmt: skip
    parser.add_argument(
        "--gbit", type=_positive, help="bandwidth of every rank's link in Gbit/s (default: as in the run)"
    )
    parser.add_argument(
        "--latency-us", type=_at_least_zero, help="latency of every link in microseconds (default: as in the run)"
    )
    parser.add_argument("--speed", type=_positive, default=1.0, help="speed of a rank, that of the run's ranks being 1")
    parser.add_argument("--steps", type=_at_least_one, help="steps of every block (default: as the run or job has it)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw efficiency against ranks")
    return parser


def _subject(options: argparse.Namespace, imagine: Imagine) -> Subject:
    named = [word.removeprefix(CLUSTER) for word in options.subject if word.startswith(CLUSTER)]
    words = [word for word in options.subject if not word.startswith(CLUSTER)]
    runs = [word for word in words if "=" not in word]
    cluster = load_cluster(named[-1]) if named else None
    given = options.gbit is not None or options.latency_us is not None
    if cluster and given:
        raise ConfigError("--gbit, --latency-us", "given", f"neither with cluster={named[-1]}: it has links of its own")
    if not runs:
        if cluster is None:
            raise ConfigError(
                "cluster", None, f"cluster=NAME for a job that has not run: {', '.join(described('cluster'))}"
            )
        if options.speed != 1:
            raise ConfigError("--speed", options.speed, "a run directory: described devices have speeds of their own")
        return Subject(*imagine(words, cluster.device, options.steps), cluster, imagined=True)
    if words != runs[:1]:
        other = next(word for word in words if word != runs[0])
        raise ConfigError("simulate", other, "one run directory alone, or settings of a job alone")
    costs, spans = measured(Path(runs[0]), speed=options.speed, steps=options.steps)
    if not given:
        return Subject(costs, spans, cluster, links=_in_words(costs.network))
    link = _given(costs.network.hop, options.gbit, options.latency_us)
    links = f"links as given, and else as in the run: {link} between any two ranks"
    return Subject(replace(costs, network=Network(within=link)), spans, links=links)


def _given(link: Link, gbit: float | None, latency_us: float | None) -> Link:
    """Return the link with what is given in place of what the run has."""
    return replace(
        link,
        bytes_per_s=link.bytes_per_s if gbit is None else gbit * 1e9 / 8,
        latency_s=link.latency_s if latency_us is None else latency_us * 1e-6,
    )


def _in_words(network: Network) -> str:
    """Say what joins the ranks of a run, and so those of all simulated sizes."""
    if len(set(network.hosts)) < 2:
        return f"links as in the run: {network.within} between the ranks of one host, on which all are taken to be"
    fullest = max(map(network.hosts.count, network.hosts))
    inside = f"{network.within} within a host of {fullest} ranks, " if fullest > 1 else ""
    return f"links as in the run: {inside}{network.between} between hosts"


def measured(run_dir: Path, *, speed: float, steps: int | None) -> tuple[Costs, list[Span]]:
    """Return the costs that a run has measured, for ranks `speed` times as fast on the run's links, and all of its
    blocks from step 0.

    Raises DistillError where the directory holds no plan, or one of an older version.
    """
    try:
        costs: Any = read_json(run_dir / "costs.json")
        plan: Any = read_json(run_dir / "plan.json")
    except DamagedFileError as damage:
        raise DistillError(f"{damage}; plan again (stage=plan run.dir=NEW ...)") from damage
    if costs is None or plan is None:
        raise DistillError(f"{run_dir}: no plan is there; expected a run directory (python -m distill stage=plan ...)")
    if "network" not in costs:
        raise DistillError(
            f"{run_dir}/costs.json: written by an older version; plan again (stage=plan run.dir=NEW ...)"
        )
    blocks = range(len(costs["seconds"]["teacher"]))  # earlier versions had one unit a block, and none of their own
    known = costs.get("units") or [{"number": block, "input": block, "target": block + 1} for block in blocks]
    units = [unit for unit in known if costs["seconds"]["student"][unit["number"]] > 0]
    budget = steps or max((span["budget"] for span in plan["spans"]), default=1)
    return (
        Costs(
            tuple(seconds / speed for seconds in costs["seconds"]["teacher"]),
            tuple(seconds / speed for seconds in costs["seconds"]["student"]),
            tuple(costs["boundary_bytes"]),
            student_bytes=tuple(costs["student_bytes"]),
            network=_network_of(costs["network"], speed=speed),
        ),
        [Span(unit["number"], 0, budget, unit["input"], unit["target"]) for unit in units],
    )


def _network_of(facts: Any, *, speed: float) -> Network:
    """Return the network that a run has recorded, on which ranks spend `speed` times less time on sending."""
    within, between = (
        replace(link, sender_s_per_byte=link.sender_s_per_byte / speed)
        for link in (Link.of_facts(facts["within"]), Link.of_facts(facts["between"]))
    )
    return Network(within, between, tuple(facts["hosts"]))


def forecast_table(found: Sequence[Named], alone: Simulation, joules: Sequence[float | None]) -> Table:
    """Return one line a named simulation; speed-ups are over `alone`, one rank that shares one teacher pass."""
    table = Table(title="simulated", title_justify="left", box=None, padding=(0, 1, 0, 0))
    powered = any(energy is not None for energy in joules)
    headings = ("ranks", "strategy", "seconds", "speed-up", "efficiency", "idle", "GB\nsent", "teacher\npasses")
    for heading in (*headings, *(["MJ"] if powered else []), ""):
        table.add_column(heading, justify="left" if heading in ("strategy", "") else "right")
    sizes = {one.plan.world_size for _, one in found}
    best = {n: min((one for _, one in found if one.plan.world_size == n), key=_seconds) for n in sizes}
    for (name, one), energy in zip(found, joules, strict=True):
        ranks, fastest = one.plan.world_size, one is best[one.plan.world_size]
        speed_up, idle = _speed_up(one, alone), max(0.0, one.mean_idle_share)
        table.add_row(
            str(ranks), name, f"{one.makespan_s:,.1f}", f"{speed_up:.2f}x",
            f"{100 * speed_up / ranks:.1f} %", f"{100 * idle:.1f} %", f"{one.bytes_sent / 1e9:,.2f}",
            f"{one.teacher_passes:,.0f}", *([f"{energy / 1e6:,.3f}"] if energy is not None else []),
            "fastest" if fastest else "", style="bold" if fastest else "",
        )  # fmt: skip
    return table


def _seconds(one: Simulation) -> float:
    return one.makespan_s


def _speed_up(one: Simulation, alone: Simulation) -> float:
    return alone.makespan_s / one.makespan_s if one.makespan_s else 0.0


def _curves(found: Sequence[Named], alone: Simulation) -> dict[str, list[tuple[int, float]]]:
    """Return every strategy's points (ranks, efficiency)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, one in found:
        ranks = one.plan.world_size
        curves.setdefault(name, []).append((ranks, _speed_up(one, alone) / ranks))
    return curves


def _preamble(subject: Subject) -> str:
    """Return what the figures rest on."""
    teacher, students = (1000 * sum(seconds) for seconds in (subject.costs.teacher_s, subject.costs.student_s))
    costs = f"one rank: teacher {teacher:.1f} ms, {len(subject.spans)} students {students:.1f} ms a batch"
    if subject.cluster is None:
        return f"{costs}, measured by the run\n{subject.links}"
    if not subject.imagined:
        return f"{costs}, measured by the run; links of {subject.cluster.title}, described and not measured"
    device = subject.cluster.device
    return (
        f"{subject.cluster.title}, {device.title}: described from data sheets, not measured\n"
        f"{costs}, by a roofline at {100 * device.compute_share:.0f} % of peak and "
        f"{100 * device.memory_share:.0f} % of memory bandwidth"
    )


def _plot_title(subject: Subject) -> str:
    if subject.cluster is None:
        return "simulated from a run's measured costs"
    kind = "described devices" if subject.imagined else "a run's measured costs, described links"
    return f"simulated: {subject.cluster.title} ({kind})"


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        where = "; a job's settings go before the options" if "=" in text else ""
        raise argparse.ArgumentTypeError(f"{text}: expected an integer >= 1{where}")
    return int(text)


def _positive(text: str) -> float:
    return _number(text, "a number > 0", lambda value: value > 0)


def _at_least_zero(text: str) -> float:
    return _number(text, "a number >= 0", lambda value: value >= 0)


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
    return value
