"""From the configuration to the things the stages work on: data and teacher."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from distill.blocks.chain import made_trainable
from distill.blocks.memory_format import to_channels_last
from distill.config.choices import CropMode, TeacherSource
from distill.config.outside import make_importable
from distill.config.plain import options_of
from distill.config.schema import JobConfig
from distill.data import Dataset
from distill.data.addressing import derive_seed
from distill.errors import ConfigError
from distill.job.context import Context
from distill.job.outputs import refuse_lazy, refuse_other_outputs
from distill.job.reuse import TEACHER, take_teacher
from distill.job.suitability import refuse_unshrinkable
from distill.observability.numbers import show_count
from distill.storage.aliases import load_state
from distill.storage.checkpoint import CheckpointFolder, contiguous
from distill.storage.files import write_bytes
from distill.student.evaluate import first_not_finite
from distill.teachers import (
    build_architecture,
    expected_preprocessing,
    load_backbone,
    load_teacher_weights,
    options_for_weights,
)
from distill.training.finetune import Epoch, FitOptions, fit
from distill.training.objective import Labels
from distill.training.team import Team

log = logging.getLogger(__name__)


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
    _tell_preprocessing(config)
    make_importable(teacher.folder)
    torch.manual_seed(derive_seed(config.seed, "teacher"))
    network = build_architecture(**architecture_of(config, len(dataset.classes)))
    refuse_lazy(config, network)
    refuse_unshrinkable(config, network)
    if teacher.weights is not None and teacher.fit_epochs > 0:
        kept = load_backbone(network, teacher.source.name, teacher.name, teacher.weights)
        log.info("teacher: all weights from %s but those of %s", teacher.weights, ", ".join(kept) or "nothing")
    elif teacher.weights is not None:
        load_teacher_weights(network, teacher.source.name, teacher.name, teacher.weights)
    elif teacher.fit_epochs == 0:
        raise ConfigError("teacher.weights", None, "a weights file, or teacher.fit.epochs > 0 to train one on the data")
    to_channels_last(network, device).eval().requires_grad_(False)
    refuse_other_outputs(config, network, dataset.image_shape, len(dataset.classes))
    return network


def _tell_preprocessing(config: JobConfig) -> None:
    """Say how images become the teacher's inputs where a registry knows what its weights expect, and what differs."""
    teacher, data = config.teacher, config.data
    if teacher.weights is None or teacher.source not in (TeacherSource.torchvision, TeacherSource.timm):
        return
    expected = expected_preprocessing(teacher.source.name, teacher.name, teacher.weights)
    if expected is None:
        return
    log.info("teacher: its weights expect %s", expected)
    settings = {
        "data.image_size": (data.side, expected.image_size),
        "data.resize": (data.resize or expected.resize, expected.resize),
        "data.interpolation": (data.interpolation.name, expected.interpolation),
        "data.crop_mode": (data.crop_mode.name, CropMode.squash.name if expected.squash else CropMode.centre.name),
        "data.mean": (config.mean, list(expected.mean)),
        "data.std": (config.std, list(expected.std)),
    }
    different = [f"{name}={got}" for name, (got, wanted) in settings.items() if got != wanted]
    if different:
        log.warning("teacher: images are prepared otherwise: %s", " ".join(different))


def train_teacher(context: Context, dataset: Dataset, teacher: nn.Module) -> None:
    """Train the teacher in place where the configuration asks for it; every rank ends with the same weights.

    Rank 0 trains alone: sums over several ranks' gradients would make the teacher, and with it every student block,
    depend on the number of ranks. Blocks cut before share the teacher's tensors and so follow.
    """
    if context.config.teacher.fit_epochs > 0:
        with context.during("teacher"):
            work = lambda: take_teacher(context) or _fit_teacher(context, dataset, teacher)  # noqa: E731
            context.lead("teacher", work, made=[TEACHER])
        load_state(teacher, load(context.run.read(TEACHER)))
    teacher.eval().requires_grad_(False)


def _fit_teacher(context: Context, dataset: Dataset, network: nn.Module) -> dict[str, Any]:
    options = context.config.teacher.fit
    epochs = context.config.teacher.fit_epochs
    times, images = show_count(epochs, "epoch"), dataset.num_train
    context.say(f"teacher: training {context.config.teacher.name} for {times} on {images} images")

    def report(course: Sequence[Epoch]) -> None:
        epoch, loss = course[-1]["epoch"], course[-1]["loss"]
        if loss is None:
            allowed = f"a lower rate: the loss is not finite in epoch {epoch}"
            raise ConfigError("teacher.fit.lr", options.lr, allowed)
        context.scalars.add("epochs/teacher_loss", loss, epoch)
        context.say(f"teacher: epoch {epoch} of {epochs:g}, loss {loss:.4f}, {course[-1]['seconds']:.1f} s")

    checkpoints = CheckpointFolder(context.run.path, generation=context.control.generation, origin=context.run.origin())
    course = fit(
        made_trainable(network),
        dataset,
        Labels(),
        options=options_of(FitOptions, options, epochs=epochs, warmup_epochs=1.0, setbacks=0),
        team=Team(),
        device=context.device,
        seed=derive_seed(context.config.seed, "teacher", "fit"),
        checkpoints=checkpoints,
        name="teacher",
        report=report,
    )
    if spoilt := first_not_finite(network):
        allowed = f"a lower rate: {spoilt} is not finite after the last epoch"
        raise ConfigError("teacher.fit.lr", options.lr, allowed)
    write_bytes(context.run.path / TEACHER, save(contiguous(network.state_dict())))
    checkpoints.remove("teacher")
    return {"epochs": course, "seconds": sum(epoch["seconds"] for epoch in course)}
