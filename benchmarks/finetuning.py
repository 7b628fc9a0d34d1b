"""What so many CPU seconds of fine-tuning make of students: of ours, chosen under budgets of latency and parameters,
and of Torch-Pruning's at the same parameters and at the same latency, by the same loop and the same loss.

    python benchmarks/finetuning.py SCRATCH --data CIFAR10_FOLDER --teachers FOLDER [--seconds 30] [--students chosen]

CIFAR10_FOLDER holds train.parquet and test.parquet; FOLDER, resnet20-12fca82f.th. All on one thread. Steps are as many
as fit into the seconds by each student's own step, which is timed first; what came out is stated. `sparse` spends half
of its seconds on training the teacher with Torch-Pruning's group regularisation before it is narrowed. Pruned students
start lower, so that they may need a higher rate: each is trained with all of --rates, and the better one on validation
images counts; ours has the rate that a job has by default. Test images are seen once a row. Rows of other students and
seconds stay in the file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import MACHINE, RESULTS, read, run, write
from pruning import cifar10, narrowed_until, params, pruner_of, teacher_network
from torch import nn

from distill import load_student
from distill.blocks.memory_format import to_channels_last
from distill.data import Dataset, open_dataset
from distill.deployment.forms import forms_of
from distill.deployment.measure import compared, summary
from distill.storage.checkpoint import CheckpointFolder
from distill.student.assemble import recalibrate
from distill.student.evaluate import count_hits
from distill.student.programs import onnx_program
from distill.training.finetune import FitOptions, fit
from distill.training.horizon import usual_rate
from distill.training.objective import Address, Distillation, Outputs, Seen, TeacherHere
from distill.training.team import Team

BUDGETS = {"latency": 0.5, "params": 0.3}
BATCHES = (1, 64)  # of which latency is measured
TIMED = 8  # steps
OBJECTIVE = Distillation(temperature=4.0, soft_weight=0.9)
RE_ESTIMATED = 50  # batches
SPARSE_RATE = 1e-3  # ten times that makes the trained teacher diverge within eight steps


@dataclass(frozen=True)
class Student:
    """A network to be fine-tuned, the CPU seconds in which it was made, and those of fine-tuning that are `spent`."""

    network: nn.Module
    cpu_seconds: float
    spent: float = 0.0


@dataclass(frozen=True)
class Bench:
    args: argparse.Namespace
    dataset: Dataset
    teacher: nn.Module

    def latencies(self, network: nn.Module) -> dict[str, float]:
        """Return the shares of the teacher's time in ONNX Runtime, fp32, one thread, by batch; of a network that has
        several forms, in the faster one at the largest batch, as it would be delivered."""
        sample = self.dataset.validation_batch(0).images[:2]
        forms = forms_of(deepcopy(network).eval())
        programs = [onnx_program(deepcopy(one).eval(), sample) for one in (self.teacher, *forms)]
        found = {}
        for batch in BATCHES:
            rounds = compared(programs, batch, 3.0, runtime="onnxruntime", threads=1, precision="fp32")
            teacher, *own = (summary(one).median_ms for one in rounds)
            found[batch] = [one / teacher for one in own]
        faster = min(range(len(forms)), key=lambda form: found[BATCHES[-1]][form])
        return {str(batch): shares[faster] for batch, shares in found.items()}

    def learn(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        regularise: Callable[[], object] = lambda: None,
    ) -> None:
        """Take one step as fit() does."""
        batch = self.dataset.train_batch(step)
        seen = Seen(Outputs(network(batch.images), {}), batch, Address(0, step), TeacherHere(self.teacher, ()))
        optimizer.zero_grad()
        OBJECTIVE(seen).backward()
        regularise()
        optimizer.step()

    # Students by name. Each is made anew for every budget of seconds.

    def chosen(self, _: float) -> Student:
        """Ours: the whole search, no gradient step."""
        run_dir = self.args.scratch.absolute() / "chosen"
        if not (run_dir / "metrics.json").exists():
            run(
                "teacher=cifar_resnet20",
                f"teacher.weights={self.args.teachers.absolute() / 'resnet20-12fca82f.th'}",
                "data=hf",
                f"data.root={self.args.data.absolute()}",
                "launch.nproc_per_node=1",
                "launch.threads_per_rank=1",
                *(f"search.budget.{name}={share}" for name, share in BUDGETS.items()),
                "distill.steps=0",
                "finetune.epochs=0",
                "deploy.programs=[]",
                run_dir=run_dir,
                OMP_NUM_THREADS="1",
            )
        scoring = read(run_dir / "metrics.json")["search"]["scoring"]["cpu_seconds"]
        return Student(load_student(run_dir).requires_grad_(True), scoring)

    def pruned(self, importance: str, budget: str, _: float) -> Student:
        """Torch-Pruning's, one-shot, of the student's parameters or latency."""
        return self._narrowed(importance, budget, lambda: teacher_network(self.args.teachers))

    def sparse(self, seconds: float) -> Student:
        """Torch-Pruning's by group norms, after training with its regularisation for half of the seconds."""
        network = to_channels_last(teacher_network(self.args.teachers).train())
        pruner = pruner_of(network, self.dataset, "magnitude", 0.5)
        start, step = time.process_time(), 0
        optimizer = torch.optim.SGD(network.parameters(), SPARSE_RATE, momentum=0.9, nesterov=True)
        pruner.update_regularizer()
        while (spent := time.process_time() - start) < seconds / 2:
            self.learn(network, optimizer, step, partial(pruner.regularize, network))
            step += 1
        found = self._narrowed("magnitude", "params", lambda: deepcopy(network).eval())
        return Student(found.network, found.cpu_seconds, spent)

    def _narrowed(self, importance: str, budget: str, make: Callable[[], nn.Module]) -> Student:
        start = time.process_time()
        share, whole = BUDGETS[budget], params(self.teacher)

        def small_enough(network: nn.Module) -> bool:
            if budget == "params":
                return params(network) <= share * whole
            return self.latencies(network)["64"] <= share

        network = narrowed_until(small_enough, make, self.dataset, importance)
        recalibrate(network, (self.dataset.train_batch(step).images for step in range(RE_ESTIMATED)))
        return Student(network, time.process_time() - start)


STUDENTS: dict[str, Callable[[Bench, float], Student]] = {
    "chosen": Bench.chosen,
    "group norm, parameters": lambda bench, seconds: bench.pruned("magnitude", "params", seconds),
    "taylor, parameters": lambda bench, seconds: bench.pruned("taylor", "params", seconds),
    "taylor, latency": lambda bench, seconds: bench.pruned("taylor", "latency", seconds),
    "sparse group norm, parameters": Bench.sparse,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--seconds", type=float, nargs="+", default=[30, 90, 270])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.05], help="of pruned students")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "finetuning.json"
    rows = read(path)["rows"] if path.exists() else {}
    with open_dataset(cifar10(args.data, batch_size=128), seed=0, device=torch.device("cpu")) as dataset:
        bench = Bench(args, dataset, to_channels_last(teacher_network(args.teachers).requires_grad_(False)))
        for seconds in args.seconds:
            for name in args.students:
                rows[f"{name}, {seconds:g} s"] = row(bench, name, seconds)
                what = "CIFAR-10 test top-1 of students of ResNet-20 after so many CPU seconds of fine-tuning"
                write("finetuning", {"what": what, "budgets": BUDGETS, "rows": rows})


def row(bench: Bench, name: str, seconds: float) -> dict[str, Any]:
    """Return what a student comes to after so many CPU seconds of fine-tuning."""
    student = STUDENTS[name](bench, seconds)
    found = [_trained(bench, student, seconds, rate) for rate in ([None] if name == "chosen" else bench.args.rates)]
    best = max(found, key=lambda one: one["validation_top1"])
    network = best.pop("network")
    return {
        "commit": MACHINE["commit"],
        "params_ratio": params(network) / params(bench.teacher),
        "latency_ratio": bench.latencies(network),
        "cpu_seconds_before": student.cpu_seconds,
        "rates_tried": len(found),
        **best,
        "cpu_seconds": best["cpu_seconds"] + student.spent,
        "top1": count_hits(network, bench.dataset.test_batches(250)).percent()["top1"],
    }


def _trained(bench: Bench, student: Student, seconds: float, rate: float | None) -> dict[str, Any]:
    network, per_epoch = deepcopy(student.network), bench.dataset.steps_per_epoch
    steps = max(1, round((seconds - student.spent) / _step_seconds(bench, network)))
    peak = usual_rate(steps) if rate is None else rate
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        fit(
            network,
            bench.dataset,
            OBJECTIVE,
            teacher=TeacherHere(bench.teacher, ()),
            options=FitOptions(epochs=steps / per_epoch, lr=peak, weight_decay=1e-4),
            team=Team(),
            device=torch.device("cpu"),
            seed=0,
            checkpoints=CheckpointFolder(Path(folder), generation=1),
            name="finetune",
            report=lambda _: None,
        )
    spent = time.process_time() - start
    validation = count_hits(network, bench.dataset.validation_batches(250)).percent()["top1"]
    return {"network": network, "cpu_seconds": spent, "steps": steps, "rate": peak, "validation_top1": validation}


def _step_seconds(bench: Bench, network: nn.Module) -> float:
    copied = to_channels_last(deepcopy(network).train())
    optimizer = torch.optim.SGD(copied.parameters(), 0.0, momentum=0.9, nesterov=True)
    found = []
    for step in range(TIMED):
        start = time.process_time()
        bench.learn(copied, optimizer, step)
        found.append(time.process_time() - start)
    return statistics.median(found[2:])


if __name__ == "__main__":
    main()
