"""Students of many families of networks without a gradient step, by one command each: parameters, error, seconds.

    python benchmarks/families.py SCRATCH [--recipes thin] [--ratios 0.5] [--names resnet50 ...]

Networks are those of torchvision and timm with random weights, branches that are switched off before training switched
on, batch norms' statistics taken of digits, which are the data too, and the last layer fitted to them by ridge
regression: what is measured is whether a student is made, how many parameters it keeps, how far its blocks and its
logits are from the teacher's on held-out images, and what is left of the accuracy that such random features have.
Seconds are the processor's, of the whole command on one thread. A network of which nothing can be made is in the table
with the reason. Other rows of the file stay.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import MACHINE, RESULTS, read, run, write
from safetensors.torch import save_file
from torch import Tensor, nn

from distill import load_student
from distill.data import Augment, DataOptions, Dataset, open_dataset
from distill.student.assemble import recalibrate
from distill.teachers import build_architecture
from distill.training.losses import relative_error

BRANCH = 0.3  # scale of what is added to a shortcut
RIDGE = 1e-2  # of the features' mean variance
SMALL, USUAL = 64, 224  # pixels; the latter where a network's positions are fixed
NETWORKS = {
    "torchvision": {
        "resnet50": SMALL, "vgg16_bn": SMALL, "mobilenet_v2": SMALL, "mobilenet_v3_small": SMALL,
        "efficientnet_b0": SMALL, "densenet121": SMALL, "convnext_tiny": SMALL, "regnet_y_400mf": SMALL,
        "vit_b_16": USUAL, "swin_t": SMALL,
    },
    "timm": {
        "resnet18d": SMALL, "resnext50_32x4d": SMALL, "res2net50_14w_8s": SMALL, "dla34": SMALL, "regnetx_002": SMALL,
        "repvgg_a0": SMALL, "vgg11_bn": SMALL, "efficientnet_lite0": SMALL, "tf_efficientnetv2_b0": SMALL,
        "mobilenetv4_conv_small": SMALL, "mnasnet_small": SMALL, "fbnetc_100": SMALL, "ghostnet_050": SMALL,
        "hardcorenas_a": SMALL, "convnextv2_atto": SMALL, "edgenext_xx_small": SMALL, "poolformer_s12": SMALL,
        "deit_tiny_patch16_224": USUAL, "mixer_s32_224": USUAL, "xcit_nano_12_p16_224": USUAL,
    },
}  # fmt: skip
RECIPES = ("thin", "lowrank")
SETTINGS = (
    "data=digits", "data.batch_size=32", "teacher.fit.epochs=0", "student.statistics_batches=4", "distill.steps=0",
    "finetune.epochs=0", "assemble.batchnorm_batches=4", "assemble.refit_images=128", "launch.nproc_per_node=1",
    "launch.threads_per_rank=1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--names", nargs="+", default=[name for names in NETWORKS.values() for name in names])
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "families.json"
    found = {_key(row): row for row in (read(path)["rows"] if path.exists() else [])}
    for source, names in NETWORKS.items():
        for name, size in names.items():
            if name in args.names:
                found |= {_key(row): row for row in _rows(args, source, name, size)}
                _write([*found.values()])
    print(_table([*found.values()]))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["network"], row["recipe"], row["ratio"]


def _write(rows: list[dict[str, Any]]) -> None:
    what = "students of untrained networks without a gradient step: parameters kept, relative errors, CPU seconds"
    write("families", {"what": what, "settings": SETTINGS, "rows": rows})


def _rows(args: argparse.Namespace, source: str, name: str, size: int) -> list[dict[str, Any]]:
    scratch = args.scratch.absolute()
    teacher = _teacher(scratch, source, name, size)
    rows = []
    for recipe in args.recipes:
        for ratio in args.ratios:
            run_dir = scratch / f"{name}-{recipe}-{ratio}"
            command = (
                f"teacher={source}", f"teacher.name={name}", f"teacher.weights={scratch / name}.safetensors",
                f"data.image_size={size}", f"student={recipe}", f"student.options.ratio={ratio}", *SETTINGS,
            )  # fmt: skip
            begin = resource.getrusage(resource.RUSAGE_CHILDREN)
            row: dict[str, Any] = {"network": name, "recipe": recipe, "ratio": ratio, "commit": MACHINE["commit"]}
            try:
                run(*command, run_dir=run_dir, OMP_NUM_THREADS="1")
            except SystemExit as failure:
                rows.append(row | {"refused": str(failure).strip().rpartition("\n")[2]})
                continue
            end = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
            rows.append(row | _found(run_dir, teacher, size) | {"cpu_seconds": round(cpu, 1)})
            print(rows[-1], flush=True)
    return rows


def _found(run_dir: Path, teacher: nn.Module, size: int) -> dict[str, Any]:
    metrics = read(run_dir / "metrics.json")
    student = load_student(run_dir).eval()
    with _digits(size) as dataset, torch.no_grad():
        images = dataset.validation_batch(0).images
        error = float(relative_error(student(images), teacher(images)))
    starts = [block["rel_error_start"] for block in metrics["blocks"]]
    return {
        "params_ratio": metrics["student"]["params"] / metrics["teacher"]["params"],
        "flops_ratio": metrics["student"]["flops"] / metrics["teacher"]["flops"],
        "blocks": len(starts),
        "mean_relative_error_of_blocks": sum(starts) / len(starts),
        "relative_error_of_logits": error,
        "teacher_top1": metrics["teacher"]["top1"],
        "student_top1": metrics["student"]["top1"],
    }


def _teacher(scratch: Path, source: str, name: str, size: int) -> nn.Module:
    """Return a network with random weights whose batch norms know digits; it is written for the commands. Where a
    branch is switched off before training (a scale of zeros, or of 1e-6), it is given some weight: whatever stood for
    it would be exact."""
    torch.manual_seed(0)
    network = build_architecture(source=source, name=name, num_classes=10)
    for path, parameter in network.named_parameters():
        if parameter.dim() == 1 and not path.endswith("bias") and parameter.abs().max() < 1e-3:
            nn.init.constant_(parameter, BRANCH)
    with _digits(size) as dataset:
        recalibrate(network, (dataset.train_batch(step).images for step in range(4)))
        _fit_last_layer(network, dataset)
    scratch.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous().clone() for key, tensor in network.state_dict().items()}
    save_file(state, scratch / f"{name}.safetensors")
    return network.eval()


@torch.no_grad()
def _fit_last_layer(network: nn.Module, dataset: Dataset) -> None:
    """Give a network in eval mode the classifier that ridge regression finds on its features of all training images."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == 10][-1]
    features: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].double()))
    labels = []
    for step in range(dataset.steps_per_epoch):
        batch = dataset.train_batch(step)
        network(batch.images)
        labels.append(batch.labels)
    hook.remove()
    rows, targets = torch.cat(features), F.one_hot(torch.cat(labels), 10).double()
    mean = rows.mean(0)
    second = (rows - mean).T @ (rows - mean)
    second.diagonal().add_(RIDGE * second.diagonal().mean())
    weight = torch.linalg.solve(second, (rows - mean).T @ targets).T
    last.weight.copy_(weight)
    last.bias.copy_(targets.mean(0) - weight @ mean)


def _digits(size: int) -> Any:
    options = DataOptions(
        name="digits",
        image_size=size,
        batch_size=32,
        augment=Augment.none,
        validation_fraction=0.1,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    return open_dataset(options, seed=0, device=torch.device("cpu"))


def _table(rows: list[dict[str, Any]]) -> str:
    heads = ["network", "recipe", "ratio", "parameters", "FLOP", "error of blocks", "of logits"]
    heads += ["teacher, %", "student, %", "CPU s"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        cells = [row["network"], row["recipe"], f"{row['ratio']:g}"]
        if "refused" in row:
            cells += [row["refused"], *[""] * (len(heads) - 4)]
        else:
            cells += [f"{row[key]:.3f}" for key in ("params_ratio", "flops_ratio")]
            cells += [f"{row[key]:.3f}" for key in ("mean_relative_error_of_blocks", "relative_error_of_logits")]
            cells += [f"{row['teacher_top1']:.1f}", f"{row['student_top1']:.1f}", f"{row['cpu_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
