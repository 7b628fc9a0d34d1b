"""SIMULATED, not measured: large networks on described clusters, and the first paper's own layer times planned anew.

    python benchmarks/simulated.py [--paper LAYER_SECONDS.csv] [--ranks 4 8 32 64 256 1024] [--steps 10000]

Devices are described from data sheets (distill/described, docs/plan.md says how); nothing is run but the planners and
the simulator. LAYER_SECONDS.csv holds the seconds that every layer took in Blakeney et al. 2021, by number of GPUs.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from measure import ROOT, write

from distill.job.simulate import imagined_costs
from distill.planning.costs import Costs, Span
from distill.planning.plan import STRATEGIES
from distill.simulation.command import CHOSEN_FROM, IMAGINED, planned
from distill.simulation.hardware import Device, load_cluster
from distill.simulation.simulator import Simulation, simulate

NETWORKS = {
    "resnet50": ("teacher=resnet50", "blocks.granularity=residual"),
    "vgg16": ("teacher=torchvision", "teacher.name=vgg16", "blocks.granularity=conv", "student.first_layer=true"),
}
CLUSTERS = ("dgx_h100", "dgx_a100")
GOALS = {8: 0.95, 64: 0.9}
PAPER_EPOCHS, PAPER_IMAGES = 30, 50_000  # for the length of a step alone
PAPER_ASSUMPTION = (
    "a layer's time is a teacher prefix, the same speed in all layers, and the rest its student; the prefix of the "
    "last layer is a share of its time: none, half, or the share of FLOPs that it has beside the student there"
)
# One FLOP/s and nothing else costs anything: its seconds are FLOPs.
FLOPS_ALONE = Device(
    title="FLOPs", source="none", peak_flops={"fp32": 1.0}, memory_bytes_per_s=1e30, memory_bytes=0, board_watts=0,
    idle_watts=0, compute_share=1, memory_share=1, launch_s=0, busy_share=1,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=Path, default=ROOT.parent / "shared" / "data" / "vgg_layer_seconds.csv")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 32, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024])
    args = parser.parse_args()
    result = {
        "what": f"SIMULATED on described devices: {args.steps} steps a block, images of 224 pixels, fp32 and tf32",
        "networks": {
            f"{network} on {cluster}, batch {batch}": _scaling(
                (*job, "data.image_size=224", f"data.batch_size={batch}"), cluster, args.ranks, args.steps
            )
            for network, job in NETWORKS.items()
            for cluster in CLUSTERS
            for batch in args.batch_sizes
        },
    }
    if args.paper.exists():
        result["first_paper"] = _first_paper(args.paper)
    write("simulated", result)


def _scaling(job: Sequence[str], cluster_name: str, ranks: Sequence[int], steps: int) -> dict[str, Any]:
    cluster = load_cluster(cluster_name)
    costs, spans = imagined_costs(job, cluster.device, steps=steps)

    def on(number: int) -> Costs:
        return replace(costs, network=cluster.network(number))

    alone = simulate(STRATEGIES["broadcast"].plan(on(1), spans, 1), on(1)).makespan_s
    return {
        "one_rank_s": alone,
        "teacher_ms": 1e3 * sum(costs.teacher_s),
        "students_ms": 1e3 * sum(costs.student_s),
        "blocks": len(spans),
        "ranks": {number: _best(on(number), spans, number, alone, cluster.device.joules) for number in ranks},
    }


def _best(
    costs: Costs, spans: Sequence[Span], ranks: int, alone: float, joules: Callable[[Sequence[float], float], float]
) -> dict[str, Any]:
    found = {name: simulate(planned(name, costs, spans, ranks), costs) for name in IMAGINED}
    best = min(found.values(), key=lambda one: one.makespan_s)
    efficiency = {name: alone / one.makespan_s / ranks for name, one in found.items()}
    return {
        "strategy": best.plan.label,
        "seconds": best.makespan_s,
        "efficiency": alone / best.makespan_s / ranks,
        "goal": GOALS.get(ranks),
        "mean_idle_share": best.mean_idle_share,
        "bytes_a_step": best.bytes_sent / max(span.steps for span in spans),
        "joules": joules(best.busy_s, best.makespan_s),
        "efficiency_by_strategy": efficiency,
    }


def _first_paper(table: Path) -> dict[str, Any]:
    """Seconds on four GPUs of the paper's layers: by its schedules, by an exact plan of its method, and by ours.

    The layer times of one GPU leave out that GPUs of one host slow each other down; those of four have it.
    """
    rows = list(csv.DictReader(table.read_text().splitlines()))
    setups = {}
    for column, batch, cluster, rule, published_s in PAPER_SETUPS:
        one, four = ([float(row[f"{column}__{gpus}gpu"]) for row in rows] for gpus in (1, 4))
        setups[column] = {
            "one_gpu_s": sum(one),
            "published_on_four_gpus_s": published_s,
            "schedule": rule.__name__.strip("_"),
            "layer_times_of_one_gpu": _on_four(one, batch, cluster, rule),
            "layer_times_of_four_gpus": _on_four(four, batch, cluster, rule),
        }
    return {"assumption": PAPER_ASSUMPTION, "setups": setups}


def _on_four(
    layer_s: Sequence[float], batch: int, cluster: str, rule: Callable[[Sequence[float]], float]
) -> dict[str, Any]:
    forward, step, sizes = _vgg16(batch)
    prefix = list(accumulate(forward))
    by_flops = prefix[-1] / (prefix[-1] + step[-1])
    blocks = range(len(layer_s))
    method = Costs((0.0,) * len(layer_s), tuple(layer_s), sizes)
    exact = STRATEGIES["layerwise"].plan(method, [Span(block, 0, 1) for block in blocks], 4)
    ours = {}
    for name, share in (("none", 0.0), ("half", 0.5), ("by FLOPs", by_flops)):
        best = _ours(layer_s, [share * layer_s[-1] * flops / prefix[-1] for flops in prefix], sizes, batch, cluster)
        ours[name] = {"seconds": best.makespan_s, "strategy": best.plan.label, "teacher_share_of_last_layer": share}
    return {
        "its_schedule_s": rule(layer_s),
        "its_method_planned_exactly_s": exact.predicted_makespan_s,
        "ours_by_teacher_share": ours,
    }


def _ours(
    layer_s: Sequence[float], prefix_s: Sequence[float], sizes: tuple[int, ...], batch: int, name: str
) -> Simulation:
    """The best of our plans where `prefix_s` of every layer's time is the teacher's, which is shared."""
    steps = PAPER_EPOCHS * PAPER_IMAGES // batch
    teacher = [after - before for before, after in pairwise([0.0, *prefix_s])]
    student = [seconds - prefix for seconds, prefix in zip(layer_s, prefix_s, strict=True)]
    assert min(student) >= 0, "more teacher than layer"
    costs = Costs(
        tuple(t / steps for t in teacher),
        tuple(s / steps for s in student),
        sizes,
        network=load_cluster(name).network(4),
    )
    spans = [Span(block, 0, steps) for block in range(len(layer_s))]
    return min(
        (simulate(STRATEGIES[name].plan(costs, spans, 4), costs) for name in CHOSEN_FROM),
        key=lambda one: one.makespan_s,
    )


@cache
def _vgg16(batch: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """FLOPs of the forward pass and of a student's step of each of the 13 layers, and the bytes of their boundaries."""
    job = ("experiment=paper_vgg16_cifar10", f"data.batch_size={batch}")
    costs, spans = imagined_costs(job, FLOPS_ALONE, steps=1)
    assert [span.unit for span in spans] == list(range(13))
    return costs.teacher_s[:13], costs.student_s[:13], costs.boundary_bytes[:14]


def _round_robin(layer_s: Sequence[float]) -> float:
    return max(sum(layer_s[rank::4]) for rank in range(4))


def _largest_first(layer_s: Sequence[float]) -> float:
    """Bin packing as the paper has it: of the four-GPU layer times it makes the 1,275 s that it publishes."""
    return _next_available(sorted(layer_s, reverse=True))


def _next_available(layer_s: Sequence[float]) -> float:
    loads = [0.0] * 4
    for seconds in layer_s:
        loads[loads.index(min(loads))] += seconds
    return max(loads)


PAPER_SETUPS = (  # columns of the table, batch, cluster, the rule that places its layers, the makespan it publishes
    ("vgg_rr_bs512_variable", 512, "hosts_rtx_2080_ti", _round_robin, None),
    ("vgg_bin_bs256_fixed", 256, "hosts_rtx_2080_ti", _largest_first, 1275),
    ("dask_vgg_cifar", 512, "nodes_rtx_6000", _next_available, 1556),
)


if __name__ == "__main__":
    main()
