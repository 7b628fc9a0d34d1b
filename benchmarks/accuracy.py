"""What accuracy the whole command gives for so many CPU seconds: ours, each of its ingredients, and what others do with
the same student and the same seconds.

    python benchmarks/accuracy.py SCRATCH --data CIFAR10_FOLDER --teachers FOLDER [--rows NAME ...] [--seconds 400]

CIFAR10_FOLDER holds train.parquet and test.parquet; FOLDER, resnet20-12fca82f.th and resnet44-014dd654.th. Rows are in
benchmarks/accuracy_rows.py. Every row is `python -m distill` with its settings, one thread a rank, no programs written
unless a row says so, over --seeds. Its CPU seconds are those of all its processes from start to end. How many steps fit
into them follows from two short commands of the same settings, whose pace is kept in SCRATCH: what a command needs
without a step has to fit too. Test images are seen once a row, by the student that validation images chose.
Torch-Pruning's students get all of the seconds for training; pruning and evaluation come on top.

Rows that are in the result file stay there until they are run again. A row that was stopped goes on with the seed that
it was at: what the same command has given is in SCRATCH, with its commit. A row that fails is told at the end.
--steps BLOCKS FINETUNE takes so many steps in the place of what fits, --also adds settings to all commands: for a trial
of rows, written to the file of --name.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accuracy_rows import PRUNED, PRUNED_SECONDS, ROWS, TASKS, TWO_RANKS, Row
from image_sets import mnist, with_wrong_labels
from measure import MACHINE, RESULTS, children_cpu_seconds, read, run, summary, write
from pruning import cifar10, teacher_network

from distill.blocks.memory_format import to_channels_last
from distill.data import open_dataset

WHAT = "top-1 of students on test images after a whole command of so many CPU seconds, one thread a rank"
# Steps of blocks and of fine-tuning from whose seconds the pace follows. Both have some of each: training is not only
# steps, but what comes with them once. From 300 steps on the fastest way to compute one is looked for.
SHORT, LONGER = (2, 4), (6, 304)
STATES = ("top1", "top1_assembled", "top1_recalibrated", "top1_finetuned")
LONGEST_NAME = 80


@dataclass(frozen=True)
class Pace:
    """CPU seconds of a command but for its steps, of a step of all blocks, and of a step of fine-tuning."""

    fixed: float
    block_step: float
    step: float

    def steps(self, seconds: float, blocks: float) -> tuple[int, int]:
        """Return the steps of blocks and of fine-tuning that fill so many seconds. Raises SystemExit where nothing is
        left for them."""
        left = seconds - self.fixed
        if left < self.step:
            raise SystemExit(f"{seconds:g} s are too few: without a step the command takes {self.fixed:.0f}")
        of_blocks = max(1, round(blocks * left / self.block_step)) if blocks else 0
        return of_blocks, max(1, round((1 - blocks) * left / self.step))


@dataclass(frozen=True)
class Bench:
    args: argparse.Namespace

    @property
    def scratch(self) -> Path:
        return Path(self.args.scratch).absolute()

    def task(self, name: str) -> list[str]:
        """Return the overrides of a task, with its folders; its images and its teacher are made where they are not
        there."""
        task, data = TASKS[name], Path(self.args.data).absolute()
        places: dict[str, Callable[[], Path]] = {
            "{data}": lambda: data,
            "{teachers}": lambda: Path(self.args.teachers).absolute(),
            "{noisy}": lambda: with_wrong_labels(data, self.scratch / "wrong_labels"),
            "{mnist}": lambda: mnist(self.scratch / "mnist"),
        }
        found = [*task.overrides]
        for place, folder in places.items():
            if any(place in one for one in found):
                found = [one.replace(place, str(folder())) for one in found]
        if not task.fit:
            return found
        teacher = self.scratch / "teachers" / slug(name) / "run"
        if not (teacher / "teacher.safetensors").exists():
            run(*found, *task.fit, "stage=teacher", *ranks(1), run_dir=teacher, OMP_NUM_THREADS="1")
        return [*found, f"teacher.weights={teacher / 'teacher.safetensors'}", "teacher.fit.epochs=0"]

    def measured(self, row: Row, steps: tuple[int, int], folder: Path, *, seconds: float, seed: int) -> dict[str, Any]:
        """Run a row's command, unless it has run in this folder; return its seconds and its metrics."""
        path, task = folder / "measured.json", self.task(row.task)
        epochs = steps[1] / TASKS[row.task].steps_per_epoch
        length = () if row.divides_itself else (f"distill.steps={steps[0]}", f"finetune.epochs={epochs}")
        asked = [one.replace("{seconds}", f"{seconds:g}") for one in row.overrides]
        command = [*task, "deploy.programs=[]", *asked, *length, *ranks(row.ranks), f"seed={seed}", *self.args.also]
        if path.exists() and read(path)["command"] == command:
            return dict(read(path))
        shutil.rmtree(folder, ignore_errors=True)  # what was stopped on the way has lost count of its seconds
        # No other run two folders above it: what others have computed would be taken from them, and not be counted.
        run_dir, before = folder / "runs" / "run", children_cpu_seconds()
        wall = run(*command, run_dir=run_dir, OMP_NUM_THREADS="1")
        spent = {"cpu_seconds": children_cpu_seconds() - before, "wall_seconds": wall}
        found = {"command": command, "commit": MACHINE["commit"], **spent, "metrics": read(run_dir / "metrics.json")}
        path.write_text(json.dumps(found))
        return found

    def pace(self, name: str, row: Row) -> Pace:
        """Return a row's pace on one rank, by two short commands."""
        alone, folder = replace(row, ranks=1), self.scratch / "pace" / slug(name)
        lengths = [(of_blocks if row.blocks else 0, others) for of_blocks, others in (SHORT, LONGER)]
        few, more = (self.measured(alone, steps, folder / f"{steps[1]}", seconds=0, seed=0) for steps in lengths)
        of_blocks = [one["metrics"]["distill"]["cpu_seconds"] for one in (few, more)]
        others = [one["cpu_seconds"] - blocks for one, blocks in zip((few, more), of_blocks, strict=True)]
        step = max(0.001, (others[1] - others[0]) / (lengths[1][1] - lengths[0][1]))
        block_step = of_blocks[1] / lengths[1][0] if row.blocks else 0.0
        return Pace(others[0] - lengths[0][1] * step, block_step, step)

    def row(self, name: str, seconds: float) -> dict[str, Any]:
        """Return what the row gives for so many seconds, over seeds."""
        row = ROWS[name]
        if self.args.steps:
            steps = (self.args.steps[0] if row.blocks else 0, self.args.steps[1])
        elif row.divides_itself:
            steps = (0, 0)
        else:  # two ranks do the work of one
            base = name.removesuffix(TWO_RANKS)
            steps = self.pace(base, ROWS[base]).steps(seconds, row.blocks)
        folder = self.scratch / "rows" / slug(name)
        found = [
            self.measured(row, steps, folder / f"{seconds:g}_s" / f"seed{seed}", seconds=seconds, seed=seed)
            for seed in range(self.args.seeds)
        ]
        return {**_facts(row, steps, found), **_accuracy([one["metrics"] for one in found])}


def _facts(row: Row, steps: tuple[int, int], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "commit": found[0]["commit"],
        "task": row.task,
        "overrides": row.overrides,
        "goal": row.goal,
        "ranks": row.ranks,
        "seeds": len(found),
        "steps": None if row.divides_itself else {"blocks": steps[0], "finetune": steps[1]},
        **{key: summary([one[key] for one in found]) for key in ("cpu_seconds", "wall_seconds")},
        "cpu_seconds_of_blocks": summary([one["metrics"]["distill"]["cpu_seconds"] for one in found]),
    }


def _accuracy(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = metrics[0]
    students = [one["student"] for one in metrics]
    states = [state for state in STATES if all(one.get(state) is not None for one in students)]
    return {
        "teacher_top1": first["teacher"]["top1"],
        **{state: summary([one[state] for one in students]) for state in states},
        "params": first["student"]["params"],
        "params_ratio": first["student"]["params"] / first["teacher"]["params"],
        "delivered": [one["delivered"] for one in students],
        "latency": first["latency"]["batches"] or None,
        # What a row is about may be among the other figures: bytes, weights that are not zero.
        "student": {key: value for key, value in first["student"].items() if isinstance(value, int | float)},
    }


def _pruned(args: argparse.Namespace, student: str, seconds: float) -> dict[str, Any]:
    """Return what Torch-Pruning's student, of benchmarks/finetuning.py, has after so many seconds of training."""
    import finetuning

    with open_dataset(cifar10(args.data, batch_size=128), seed=0, device=torch.device("cpu")) as dataset:
        teacher = to_channels_last(teacher_network(args.teachers).requires_grad_(False))
        bench = finetuning.Bench(argparse.Namespace(**vars(args), rates=[0.02]), dataset, teacher)
        return {"task": "ResNet-20", **finetuning.row(bench, student, seconds)}


def _usual_seconds(name: str) -> Sequence[float]:
    return ROWS[name].seconds if name in ROWS else PRUNED_SECONDS


def ranks(number: int) -> tuple[str, str]:
    return f"launch.nproc_per_node={number}", "launch.threads_per_rank=1"


def slug(name: str) -> str:
    """Return a row's name as one of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name)[:LONGEST_NAME]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *PRUNED], default=[*ROWS, *PRUNED], metavar="NAME")
    parser.add_argument("--seconds", type=float, nargs="+", help="in the place of each row's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, metavar=("BLOCKS", "FINETUNE"))
    parser.add_argument("--also", nargs="+", default=[], metavar="OVERRIDE", help="for every command")
    parser.add_argument("--name", default="accuracy", help="of the result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path, failed = RESULTS / f"{args.name}.json", []
    for name in args.rows:
        for seconds in args.seconds or ((0.0,) if args.steps and name in ROWS else _usual_seconds(name)):
            try:
                found = Bench(args).row(name, seconds) if name in ROWS else _pruned(args, PRUNED[name], seconds)
            except SystemExit as error:  # the others are worth having all the same
                failed.append(f"{name}, {seconds:g} s: {error}")
                continue
            rows = read(path)["rows"] if path.exists() else {}
            rows[f"{name}, {seconds:g} s"] = found
            write(args.name, {"what": WHAT, "rows": rows})
    if failed:
        raise SystemExit("\n".join(["rows without a result:", *failed]))


if __name__ == "__main__":
    main()
