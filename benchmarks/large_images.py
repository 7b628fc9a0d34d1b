"""Students of networks for images of 224 pixels under budgets of latency: what is found, predicted and measured.

    python benchmarks/large_images.py SCRATCH [--names resnet18 ...] [--budgets 0.5 0.3]

Weights are random, so that accuracies say nothing; images are the embedded digits, enlarged; latencies are those of one
image. A budget is a whole command on one rank of one thread without a gradient step; the second one of a network takes
the scores of candidates from the first. Seconds are the processor's, the memory is the peak of the largest process so
far. Other rows of the file stay; a network whose command fails is in it with the reason.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch
from measure import MACHINE, RESULTS, read, start, write
from safetensors.torch import save_file

from distill.teachers import build_architecture

NAMES = ("resnet18", "mobilenet_v2", "efficientnet_b0", "resnet50", "vgg16_bn", "convnext_tiny", "vit_b_16")
SETTINGS = (
    "teacher=torchvision", "teacher.fit.epochs=0", "data=digits", "data.image_size=224", "data.batch_size=16",
    "student.statistics_batches=4", "search.images=64", "distill.steps=0", "finetune.epochs=0",
    "assemble.batchnorm_batches=2", "assemble.refit_images=64", "deploy.batch=1", "plan.cost=flops",
    "launch.nproc_per_node=1", "launch.threads_per_rank=1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3], help="shares of the teacher's time")
    args = parser.parse_args()
    path = RESULTS / "large_images.json"
    rows = {_key(row): row for row in (read(path)["rows"] if path.exists() else [])}
    for name in args.names:
        weights = _weights(args.scratch.absolute(), name)
        for budget in args.budgets:
            row = {"network": name, "budget": budget, "commit": MACHINE["commit"]} | _row(weights, budget)
            rows[_key(row)] = row
            what = "students of networks for images of 224 pixels under budgets of latency at batch 1, random weights"
            write("large_images", {"what": what, "settings": SETTINGS, "rows": [*rows.values()]})


def _key(row: dict[str, Any]) -> tuple[str, float]:
    return row["network"], row["budget"]


def _weights(scratch: Path, name: str) -> Path:
    path = scratch / f"{name}.safetensors"
    if not path.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        network = build_architecture(source="torchvision", name=name, num_classes=10)
        save_file({key: tensor.contiguous().clone() for key, tensor in network.state_dict().items()}, path)
    return path


def _row(weights: Path, budget: float) -> dict[str, Any]:
    run_dir = weights.parent / weights.stem / f"{budget:g}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = (f"teacher.name={weights.stem}", f"teacher.weights={weights}", f"search.budget.latency={budget:g}")
    process = start(*SETTINGS, *words, run_dir=run_dir, OMP_NUM_THREADS="1")
    failed = process.wait() != 0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = {
        "cpu_seconds": round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_gib": round(used.ru_maxrss / 2**20, 2),  # of the largest process so far
    }
    if failed:
        words = Path(f"{run_dir}.log").read_text().strip().splitlines()
        return spent | {"refused": words[-1] if words else "nothing was said"}
    metrics = read(run_dir / "metrics.json")
    found = metrics["search"]["budgets"][0]
    latency, measured = metrics["latency"], found["measured"]
    return spent | {
        "candidates": len(metrics["search"]["candidates"]),
        "scoring": metrics["search"]["scoring"],
        "predicted_ms": found["predicted"]["latency"],
        "measured_ms": measured["latency"],
        "teacher_ms": measured["latency_of_teacher"],
        "ratio": measured["latency"] / measured["latency_of_teacher"],
        "batches": latency["batches"],
        "params_ratio": metrics["student"]["params"] / metrics["teacher"]["params"],
        "chosen": found["chosen"],
    }


if __name__ == "__main__":
    main()
