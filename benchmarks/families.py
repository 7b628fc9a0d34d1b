"""Students of many families of networks without a gradient step, by one command each: parameters, accuracy, seconds.

    python benchmarks/families.py SCRATCH [--recipes thin] [--ratios 0.5] [--names resnet50 ...]

Networks are those of torchvision and timm, trained for --epochs on digits of 64 pixels: enough for weights and
activations to have the structure that random ones lack, of which nothing can be left out. What is measured is whether a
student is made, how many parameters it keeps, how far its blocks and its logits are from the teacher's on held-out
images, and both accuracies. Seconds are the processor's, of the whole command on one thread. A network of which nothing
can be made is in the table with the reason. Other rows of the file stay.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import MACHINE, RESULTS, read, run, write
from safetensors.torch import load_file, save_file
from torch import nn

from distill import load_student
from distill.data import Augment, DataOptions, open_dataset
from distill.student.assemble import recalibrate
from distill.teachers import build_architecture
from distill.training.losses import relative_error

SIZE = 64  # pixels
RATE = 1e-3  # of AdamW, falling by a cosine
NETWORKS: dict[str, dict[str, dict[str, int]]] = {  # with the arguments of their architectures
    "torchvision": {
        "resnet50": {}, "vgg16_bn": {}, "mobilenet_v2": {}, "mobilenet_v3_small": {}, "efficientnet_b0": {},
        "densenet121": {}, "convnext_tiny": {}, "regnet_y_400mf": {}, "vit_b_16": {"image_size": SIZE}, "swin_t": {},
    },
    "timm": {
        "resnet18d": {}, "resnext50_32x4d": {}, "res2net50_14w_8s": {}, "dla34": {}, "regnetx_002": {},
        "repvgg_a0": {}, "vgg11_bn": {}, "efficientnet_lite0": {}, "tf_efficientnetv2_b0": {},
        "mobilenetv4_conv_small": {}, "mnasnet_small": {}, "fbnetc_100": {}, "ghostnet_050": {}, "hardcorenas_a": {},
        "convnextv2_atto": {}, "edgenext_xx_small": {}, "poolformer_s12": {},
        "deit_tiny_patch16_224": {"img_size": SIZE}, "mixer_s32_224": {"img_size": SIZE},
        "xcit_nano_12_p16_224": {"img_size": SIZE},
    },
}  # fmt: skip
RECIPES = ("thin", "lowrank")
# The blocks of networks that torch.fx cannot trace.
BLOCKS = {"vgg11_bn": "features.*,pre_logits.fc1,pre_logits.fc2,head"}
SETTINGS = (
    "data=digits", "data.batch_size=32", "teacher.fit.epochs=0", "student.statistics_batches=4", "distill.steps=0",
    "finetune.epochs=0", "assemble.batchnorm_batches=4", "assemble.refit_images=128", "launch.nproc_per_node=1",
    "launch.threads_per_rank=1", "deploy.programs=[]",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--epochs", type=int, default=5, help="of training a network before")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--names", nargs="+", default=[name for names in NETWORKS.values() for name in names])
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "families.json"
    found = {_key(row): row for row in (read(path)["rows"] if path.exists() else [])}
    for source, names in NETWORKS.items():
        for name, options in names.items():
            if name in args.names:
                found |= {_key(row): row for row in _rows(args, source, name, options)}
                _write([*found.values()])
    print(_table([*found.values()]))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["network"], row["recipe"], row["ratio"]


def _write(rows: list[dict[str, Any]]) -> None:
    what = "students without a gradient step of networks trained a little: parameters, errors, top-1, CPU seconds"
    write("families", {"what": what, "settings": SETTINGS, "rows": rows})


def _rows(args: argparse.Namespace, source: str, name: str, options: dict[str, int]) -> list[dict[str, Any]]:
    scratch = args.scratch.absolute()
    teacher = _teacher(scratch, source, name, options, args.epochs)
    given = [f"+teacher.options.{key}={value}" for key, value in options.items()]
    if name in BLOCKS:
        given += ["blocks.granularity=modules", f"blocks.modules=[{BLOCKS[name]}]"]
    rows = []
    for recipe in args.recipes:
        for ratio in args.ratios:
            run_dir = scratch / f"{name}-{recipe}-{ratio}"
            command = (
                f"teacher={source}", f"teacher.name={name}", f"teacher.weights={scratch / name}.safetensors",
                f"data.image_size={SIZE}", f"student={recipe}", f"student.options.ratio={ratio}", *given, *SETTINGS,
            )  # fmt: skip
            begin = resource.getrusage(resource.RUSAGE_CHILDREN)
            row: dict[str, Any] = {"network": name, "recipe": recipe, "ratio": ratio, "commit": MACHINE["commit"]}
            row |= {"epochs": args.epochs}
            try:
                run(*command, run_dir=run_dir, OMP_NUM_THREADS="1")
            except SystemExit as failure:
                rows.append(row | {"refused": str(failure).strip().rpartition("\n")[2]})
                continue
            end = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
            rows.append(row | _found(run_dir, teacher) | {"cpu_seconds": round(cpu, 1)})
            print(rows[-1], flush=True)
    return rows


def _found(run_dir: Path, teacher: nn.Module) -> dict[str, Any]:
    metrics = read(run_dir / "metrics.json")
    student = load_student(run_dir).eval()
    with _digits() as dataset, torch.no_grad():
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


def _teacher(scratch: Path, source: str, name: str, options: dict[str, int], epochs: int) -> nn.Module:
    """Return a network that has been trained a little; it is written for the commands, and read where it is written."""
    torch.manual_seed(0)
    network = build_architecture(source=source, name=name, num_classes=10, options=options).train()
    path = scratch / f"{name}.safetensors"
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval()
    with _digits() as dataset:
        steps = epochs * dataset.steps_per_epoch
        optimizer = torch.optim.AdamW(network.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            batch = dataset.train_batch(step)
            optimizer.zero_grad()
            F.cross_entropy(network(batch.images), batch.labels).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        recalibrate(network, (dataset.train_batch(step).images for step in range(8)))
    scratch.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous().clone() for key, tensor in network.state_dict().items()}
    save_file(state, path)
    return network.eval()


def _digits() -> Any:
    options = DataOptions(
        name="digits",
        image_size=SIZE,
        batch_size=32,
        augment=Augment.none,
        validation_fraction=0.1,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    return open_dataset(options, seed=0, device=torch.device("cpu"))


def _table(rows: list[dict[str, Any]]) -> str:
    """Return a row for every network: the share of parameters that each student keeps, and its top-1."""
    kinds = sorted({(row["recipe"], row["ratio"]) for row in rows}, reverse=True)
    heads = ["network", "teacher, %", *(f"{recipe} {ratio:g}" for recipe, ratio in kinds), "CPU s of a command"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for network in dict.fromkeys(row["network"] for row in rows):
        found = {(row["recipe"], row["ratio"]): row for row in rows if row["network"] == network}
        made = [row for row in found.values() if "refused" not in row]
        epochs = {row.get("epochs", 5) for row in found.values()}
        named = network if epochs == {5} else f"{network} ({max(epochs)} epoch)"
        cells = [named, f"{made[0]['teacher_top1']:.1f}" if made else "", *(_cell(found.get(kind)) for kind in kinds)]
        seconds = [row["cpu_seconds"] for row in made]
        cells.append(f"{min(seconds):.0f} to {max(seconds):.0f}" if made else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    return "refused" if "refused" in row else f"{row['params_ratio']:.2f}: {row['student_top1']:.1f} %"


if __name__ == "__main__":
    main()
