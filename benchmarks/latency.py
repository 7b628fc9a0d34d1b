"""Latencies of whole students as predicted from chains of blocks, against the assembled networks.

    python benchmarks/latency.py [--teachers cifar_resnet20 ...] [--batches 1 64] [--runtime onnxruntime]

Students take a recipe for every block at random from a pool, or keep the block; weights are random, since they do not
count. Every chain and every network is timed here, and nothing is read that was timed before. Seconds are the
processor's, one thread. Other rows of the file stay.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, read, write
from torch import nn

from distill.config.compose import compose
from distill.deployment.chains import LatencyTable
from distill.deployment.runtimes import Runtime, runtime_of
from distill.deployment.tables import KeptHere
from distill.job.blocks import Blocks, cut_blocks
from distill.student.assemble import assemble
from distill.teachers import build_architecture

CPU = torch.device("cpu")
SIDE = 32
POOL = {
    "separable, one filter": ("student=separable", "student.rank=1"),
    "separable, two": ("student=separable", "student.rank=2"),
    "low rank, spatial": ("student=lowrank", "student.options.form=spatial", "student.options.ratio=0.5"),
    "thin": ("student=thin", "student.options.ratio=0.5"),
    "skip": ("student=skip",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", default=["cifar_resnet20"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--students", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runtime = runtime_of(args.runtime, threads=1, precision=args.precision, device="cpu")
    path = RESULTS / "latency.json"
    rows = {_key(row): row for row in (read(path)["rows"] if path.exists() else [])}
    for name in args.teachers:
        for batch in args.batches:
            row = _row(name, runtime, batch, args.students)
            rows[_key(row)] = row
            what = "milliseconds of students predicted from chains of blocks, and measured on the whole network"
            write("latency", {"what": what, "pool": POOL, "rows": [*rows.values()]})
            print(row)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("teacher", "runtime", "precision", "batch"))


def _row(name: str, runtime: Runtime, batch: int, number: int) -> dict[str, Any]:
    began = time.process_time()
    torch.manual_seed(0)
    teacher = build_architecture(source="cifar", name=name, num_classes=10).eval()
    pool = {label: _blocks(name, teacher, words) for label, words in POOL.items()}
    chosen = [_choice(pool, random.Random(seed)) for seed in range(number)]
    with tempfile.TemporaryDirectory() as folder:
        timings = KeptHere(runtime.environment, Path(folder))
        table = LatencyTable(next(iter(pool.values())).chain, teacher, runtime, batch=batch, timings=timings)
        found = [_student(table, teacher, pool, labels) for labels in chosen]
        pieces = len([*Path(folder).rglob("*-over-*.json")])
    errors = [abs(one["error"]) for one in found]
    return {
        "teacher": name, **{key: runtime.environment[key] for key in ("runtime", "version", "precision", "clock")},
        "batch": batch, "teacher_ms": table.teacher.median_ms, "students": found,
        "median_error": statistics.median(errors), "largest_error": max(errors), "differences_timed": pieces,
        "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def _blocks(name: str, teacher: nn.Module, words: Sequence[str]) -> Blocks:
    """Return what a recipe makes of every block that it can change."""
    config = compose([f"teacher={name}", "data=cifar10", "data.root=.", *words])
    return replace(cut_blocks(config, (3, SIDE, SIDE), teacher, CPU), remarks=())


def _choice(pool: dict[str, Blocks], generator: random.Random) -> dict[int, str]:
    """Return a recipe's label for some blocks, one of those that can change each."""
    places = sorted({number for blocks in pool.values() for number in blocks.candidates})
    able = {block: [label for label, blocks in pool.items() if block in blocks.candidates] for block in places}
    picked = {block: generator.choice(["keep", *labels]) for block, labels in able.items()}
    return {block: label for block, label in picked.items() if label != "keep"}


def _student(
    table: LatencyTable, teacher: nn.Module, pool: dict[str, Blocks], labels: dict[int, str]
) -> dict[str, Any]:
    modules = {block: pool[label].build(block).eval() for block, label in labels.items()}
    parts = [pool[label].candidates[block] for block, label in sorted(labels.items())]
    student = assemble(teacher, changed=[(one.recipe, one.changes) for one in parts], blocks=())
    one = table.additivity(modules, student.eval())
    return {"predicted_ms": one.predicted_ms, "measured_ms": one.measured_ms, "error": one.error}


if __name__ == "__main__":
    main()
