"""From the configuration to the things the stages work on: data, teacher, blocks and recipe."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from distill.chain import Chain, Granularity, cut
from distill.checkpoint import CheckpointFolder, contiguous
from distill.choices import Amp, AugmentName
from distill.config import JobConfig
from distill.control import ranks_of
from distill.data import Augment, Dataset, open_dataset
from distill.data.addressing import derive_seed
from distill.errors import ConfigError, one_of
from distill.files import write_bytes
from distill.finetune import FitOptions, Team, fit, label_loss
from distill.graphed_teacher import GraphedChain
from distill.graphs import cuda_capture
from distill.job.context import Context
from distill.job.reuse import TEACHER, take_teacher
from distill.lanes import Lane
from distill.precision import Bf16Chain
from distill.recipes import RECIPES, Recipe
from distill.report.markup import show_count
from distill.teachers import build_architecture, load_backbone, load_teacher_weights, options_for_weights

log = logging.getLogger(__name__)


def open_data(config: JobConfig, device: torch.device) -> Dataset:
    """Open the configured images; nothing is written."""
    data = config.data
    augment = {name: Augment[name.name] for name in AugmentName}[data.augment]
    return open_dataset(
        name=data.name.name,
        root=data.root,
        image_size=data.image_size,
        augment=augment,
        batch_size=data.batch_size,
        seed=config.seed,
        validation_fraction=data.validation_fraction,
        mean=config.teacher.mean or data.mean,
        std=config.teacher.std or data.std,
        device=device,
        num_workers=data.num_workers,
        ranks_here=ranks_of(os.environ)[3],
        memory_limit_gib=data.memory_limit_gib,
        max_bad_images=data.max_bad_images,
        download=data.download,
        train_split=data.train_split,
        test_split=data.test_split,
        image_column=data.image_column,
        label_column=data.label_column,
        exif_orientation=data.exif_orientation,
    )


def architecture_of(config: JobConfig, num_classes: int) -> dict[str, Any]:
    """Return the arguments of build_architecture(), all of them JSON values: they travel with the student."""
    teacher = config.teacher
    needed = options_for_weights(teacher.source.name, teacher.name, teacher.weights)
    return {
        "source": teacher.source.name,
        "name": teacher.name,
        "num_classes": num_classes,
        "factory": teacher.factory,
        "options": needed | dict(teacher.options),
    }


def build_teacher(config: JobConfig, dataset: Dataset, device: torch.device) -> nn.Module:
    """Return the teacher with its weights as far as they are given, frozen, on the device, in channels_last."""
    teacher = config.teacher
    if teacher.folder is not None and teacher.folder not in sys.path[:1]:
        sys.path.insert(0, teacher.folder)
    torch.manual_seed(derive_seed(config.seed, "teacher"))
    network = build_architecture(**architecture_of(config, len(dataset.classes)))
    if teacher.weights is not None and teacher.fit_epochs > 0:
        kept = load_backbone(network, teacher.source.name, teacher.name, teacher.weights)
        log.info("teacher: all weights from %s but those of %s", teacher.weights, ", ".join(kept) or "nothing")
    elif teacher.weights is not None:
        load_teacher_weights(network, teacher.source.name, teacher.name, teacher.weights)
    elif teacher.fit_epochs == 0:
        raise ConfigError("teacher.weights", None, "a weights file, or teacher.fit.epochs > 0 to train one on the data")
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def train_teacher(context: Context, dataset: Dataset, teacher: nn.Module) -> None:
    """Train the teacher in place where the configuration asks for it; every rank ends with the same weights.

    Rank 0 trains alone: sums over several ranks' gradients would make the teacher, and with it every student block,
    depend on the number of ranks. Blocks cut before share the teacher's tensors and so follow.
    """
    if context.config.teacher.fit_epochs > 0:
        with context.during("teacher"):
            work = lambda: take_teacher(context) or _fit_teacher(context, dataset, teacher)  # noqa: E731
            context.lead("teacher", work, made=[TEACHER])
        teacher.load_state_dict(load(context.run.read(TEACHER)))
    teacher.eval().requires_grad_(False)


def _fit_teacher(context: Context, dataset: Dataset, network: nn.Module) -> dict[str, Any]:
    options = context.config.teacher.fit
    epochs = context.config.teacher.fit_epochs
    times, images = show_count(epochs, "epoch"), dataset.num_train
    context.say(f"teacher: training {context.config.teacher.name} for {times} on {images} images")
    course: list[dict[str, float]] = []

    def report(epoch: int, loss: float, seconds: float) -> None:
        course.append({"epoch": epoch, "loss": loss, "seconds": seconds})
        context.scalars.add("epochs/teacher_loss", loss, epoch)
        context.say(f"teacher: epoch {epoch} of {epochs}, loss {loss:.4f}, {seconds:.1f} s")

    checkpoints = CheckpointFolder(context.run.path, generation=context.control.generation, origin=context.run.origin())
    fit(
        network.requires_grad_(True),
        dataset,
        label_loss,
        options=FitOptions(epochs=epochs, lr=options.lr, weight_decay=options.weight_decay, warmup_epochs=1.0),
        team=Team(),
        device=context.device,
        checkpoints=checkpoints,
        name="teacher",
        report=report,
    )
    write_bytes(context.run.path / TEACHER, save(contiguous(network.state_dict())))
    checkpoints.remove("teacher")
    return {"epochs": course, "seconds": sum(epoch["seconds"] for epoch in course)}


@dataclass(frozen=True)
class Blocks:
    """The cut teacher, the recipe, and for every block that gets a student the convolutions to replace in it."""

    chain: Chain
    recipe: Recipe
    replaced: dict[int, tuple[str, ...]]

    @property
    def replaced_paths(self) -> list[str]:
        """The qualified paths of all replaced convolutions, in the network's order."""
        return [path for block in sorted(self.replaced) for path in self.replaced[block]]


def cut_blocks(config: JobConfig, image_shape: tuple[int, ...], teacher: nn.Module, device: torch.device) -> Blocks:
    """Cut the teacher for images of that shape (channels, height, width) and choose the blocks that get students.

    Raises ConfigError where patterns name no block, or where the recipe finds nothing to replace.
    """
    sample = torch.zeros(config.data.batch_size, *image_shape, device=device)
    chain = cut(
        teacher,
        sample.to(memory_format=torch.channels_last),
        granularity=Granularity[config.blocks.granularity.name],
        modules=config.blocks.modules,
    )
    if config.teacher.amp is Amp.bf16:
        chain = Bf16Chain(chain)
    if device.type == "cuda" and config.distill.cuda_graphs:
        chain = GraphedChain(chain, cuda_capture(Lane(device)))
    recipe = make_recipe(config)
    names = [block.name for block in chain.blocks]
    chosen = _matching("blocks.include", config.blocks.include, names)
    chosen -= _matching("blocks.exclude", config.blocks.exclude, names)
    kept = None if config.student.first_layer else chain.first_convolution
    replaced = {}
    for block in chain.blocks:
        paths = tuple(
            path for path in block.convolutions if recipe.replaces(teacher.get_submodule(path)) and path != kept
        )
        if paths and block.name in chosen:
            replaced[block.index] = paths
    if not replaced:
        raise ConfigError(
            "student.recipe",
            config.student.recipe.name,
            f"a network with dense convolutions larger than 1 x 1 in the chosen blocks; {config.teacher.name} has none "
            f"(its blocks: {', '.join(names)})",
        )
    return Blocks(chain, recipe, replaced)


def make_recipe(config: JobConfig) -> Recipe:
    """Return the configured recipe."""
    return RECIPES[config.student.recipe.name](rank=config.student.rank, init=config.student.init.name)


def _matching(setting: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ConfigError(setting, pattern, f"a pattern that matches a block: {one_of(names, pattern)}")
        found |= matches
    return found
