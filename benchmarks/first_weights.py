"""Students without a gradient step: what first weights alone keep of networks, and what Torch-Pruning has there.

    python benchmarks/first_weights.py SCRATCH --data CIFAR10_FOLDER --teachers FOLDER [--seeds 3]

CIFAR10_FOLDER holds train.parquet and test.parquet; FOLDER, resnet20-12fca82f.th and resnet44-014dd654.th. Every row is
the whole command, one rank of one thread, over seeds, which choose the batches of the statistics; test images are seen
once, by the student that validation images chose. Torch-Pruning (pip install -e '.[benchmarks]') narrows the inner
convolutions of blocks, since what it makes of shortcuts that pad channels does not run; the same number of batches
re-estimates its batch norms.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import MACHINE, RESULTS, children_cpu_seconds, read, run, summary, write
from pruning import IMPORTANCES, cifar10, narrowed_until, params, teacher_network

from distill.data import open_dataset
from distill.student.assemble import recalibrate
from distill.student.evaluate import count_hits

TEACHERS = {"cifar_resnet20": "resnet20-12fca82f.th", "cifar_resnet44": "resnet44-014dd654.th"}
NO_STEP = ("distill.steps=0", "finetune.epochs=0")
EARLY_BLOCKS_MORE = (
    "student.per_block={layer1.*: {recipe: keep}, layer2.*: {recipe: separable, rank: 5}, "
    "layer3.*: {recipe: separable, rank: 3}, layer3.0: {recipe: separable, rank: 4}}"
)
RE_ESTIMATED = 50  # batches


@dataclass(frozen=True)
class Row:
    teacher: str
    overrides: tuple[str, ...]
    most_params: float
    goal: float


ROWS = {
    "separable": Row("cifar_resnet20", ("student=separable", *NO_STEP), 0.28, 83.0),
    "separable, early blocks more": Row(
        "cifar_resnet20", ("student=separable", EARLY_BLOCKS_MORE, *NO_STEP), 0.52, 89.8
    ),
    "lowrank, spatial": Row(
        "cifar_resnet20",
        ("student=lowrank", "student.options={form: spatial, ratio: 0.51}", "student.align=8", *NO_STEP),
        0.52,
        89.8,
    ),
    "separable of ResNet-44": Row("cifar_resnet44", ("student=separable", *NO_STEP), 0.30, 87.5),
    "separable, one epoch of blocks": Row(
        "cifar_resnet20", ("student=separable", "distill.epochs=1", "finetune.epochs=0"), 0.28, 88.5
    ),
    "separable, one epoch of whole stages": Row(
        "cifar_resnet20",
        ("student=separable", "blocks.granularity=resolution", "distill.epochs=1", "finetune.epochs=0"),
        0.28,
        88.5,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "first_weights.json"
    rows = read(path)["rows"] if path.exists() else {}
    rows |= {name: _row(args, name) for name in args.rows}
    share = rows["separable"]["params_ratio"]
    pruned = {seed: _one_shot(args, seed, share) for seed in range(args.seeds)}
    write(
        "first_weights",
        {
            "what": "students without a gradient step (one row: after one epoch of blocks), CIFAR-10 test top-1",
            "seeds": list(range(args.seeds)),
            "rows": rows,
            "torch_pruning_one_shot": {
                name: summary([pruned[seed][name] for seed in pruned])
                for name in ("params_ratio", "magnitude", "taylor")
            },
        },
    )


def _row(args: argparse.Namespace, name: str) -> dict[str, Any]:
    row = ROWS[name]
    found = [
        _measured(args, row, args.scratch.absolute() / f"{name.replace(' ', '_')}-{n}", n) for n in range(args.seeds)
    ]
    return {
        "teacher": row.teacher,
        "commit": MACHINE["commit"],
        "overrides": row.overrides,
        "goal": f"at least {row.goal} with at most {row.most_params} of the parameters",
        "params_ratio": found[0]["params_ratio"],
        **{key: summary([one[key] for one in found]) for key in found[0] if key != "params_ratio"},
    }


def _measured(args: argparse.Namespace, row: Row, run_dir: Path, seed: int) -> dict[str, float]:
    cpu = children_cpu_seconds()
    wall = run(
        f"teacher={row.teacher}",
        f"teacher.weights={args.teachers.absolute() / TEACHERS[row.teacher]}",
        "data=hf",
        f"data.root={args.data.absolute()}",
        "launch.nproc_per_node=1",
        "launch.threads_per_rank=1",
        f"seed={seed}",
        *row.overrides,
        run_dir=run_dir,
        OMP_NUM_THREADS="1",
    )
    metrics = read(run_dir / "metrics.json")
    stages = {stage: read(run_dir / "stages" / f"{stage}.json")["result"] for stage in ("first_weights", "assemble")}
    student, teacher = metrics["student"], metrics["teacher"]
    errors = [block["rel_error_start"] for block in metrics["blocks"]]
    return {
        "params_ratio": student["params"] / teacher["params"],
        "teacher_top1": teacher["top1"],
        "top1": student["top1"],
        "top1_assembled": student["top1_assembled"],
        "first_weights_seconds": stages["first_weights"]["seconds"],
        "assemble_seconds": stages["assemble"]["seconds"],
        "command_seconds": wall,
        "command_cpu_seconds": children_cpu_seconds() - cpu,
        "mean_relative_error_of_blocks": sum(errors) / len(errors),
    }


def _one_shot(args: argparse.Namespace, seed: int, share: float) -> dict[str, float]:
    """Prune ResNet-20 once to that share of its parameters; return the test accuracies by what tells channels apart."""
    whole = params(teacher_network(args.teachers))
    found: dict[str, Any] = {}
    with open_dataset(cifar10(args.data, batch_size=64), seed=seed, device=torch.device("cpu")) as dataset:
        for importance in IMPORTANCES:
            network = narrowed_until(
                lambda one: params(one) <= share * whole, lambda: teacher_network(args.teachers), dataset, importance
            )
            recalibrate(network, (dataset.train_batch(step).images for step in range(RE_ESTIMATED)))
            found[importance] = count_hits(network, dataset.test_batches(250)).percent()["top1"]
            found["params_ratio"] = params(network) / whole
    return found


if __name__ == "__main__":
    main()
