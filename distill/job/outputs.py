"""What the teacher answers on a sample, compared with the data's classes before anything is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distill.blocks.chain import copied
from distill.blocks.cut import run_sample
from distill.config.choices import TeacherSource
from distill.config.schema import JobConfig
from distill.errors import ConfigError

Refusal = Callable[[str], ConfigError]


def refuse_lazy(config: JobConfig, network: nn.Module) -> None:
    """Raise where a layer still waits for its first input to know its size."""
    for name, parameter in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(parameter):
            allowed = (
                f"layers that know their sizes; {name} is lazy: run the network once on an image before returning it"
            )
            raise _refusal(config)(allowed)


def refuse_other_outputs(config: JobConfig, network: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise unless the network, in eval mode, turns images into one logit a class, and does so in training mode too
    where it will be trained as a whole. The network, its statistics and all random numbers stay as they are."""
    refuse = _refusal(config)
    device = next(network.parameters(), torch.empty(0)).device
    sample = torch.zeros(2, *image_shape, device=device).to(memory_format=torch.channels_last)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        _refuse_kinds(network, refuse)
        _check(run_sample(network, sample), num_classes, "in eval mode", refuse)
        if sample._version > 0:
            raise refuse(
                "a network that leaves its input as it is; it changes the images in place (x -= mean: x = x - mean)"
            )
        if config.teacher.fit_epochs > 0 or config.finetune.epochs > 0:
            output = _in_training_mode(network, sample, refuse)
            _check(output, num_classes, "in training mode", refuse)


def _refusal(config: JobConfig) -> Refusal:
    """Return what makes an error about the setting that the network comes from."""
    own = config.teacher.source is TeacherSource.factory
    setting, given = ("teacher.factory", config.teacher.factory) if own else ("teacher.name", config.teacher.name)
    return lambda allowed: ConfigError(setting, given, allowed)


def _refuse_kinds(network: nn.Module, refuse: Refusal) -> None:
    for name, parameter in network.named_parameters():
        if parameter.is_complex() or parameter.dtype in (torch.float64, torch.float16, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise refuse(f"a network with parameters in float32; {name} is {kind}")


def _in_training_mode(network: nn.Module, sample: Tensor, refuse: Refusal) -> object:
    try:
        return copied(network).train()(sample.clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network's own code can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        allowed = (
            "a network that runs in training mode too, as teacher.fit.epochs and finetune.epochs need (0: neither); "
            f"with a batch of {tuple(sample.shape)} it says: {reason}"
        )
        raise refuse(allowed) from error


def _check(output: object, num_classes: int, mode: str, refuse: Refusal) -> None:
    wanted = f"a network that gives one tensor of logits (batch, {num_classes}); {mode} it gives"
    if not isinstance(output, Tensor):
        raise refuse(f"{wanted} {_described(output)}: return the logits alone, without auxiliary outputs")
    shape = tuple(output.shape)
    if len(shape) != 2 or shape[0] != 2:
        described = ", ".join(["batch" if shape[:1] == (2,) else str(shape[:1]), *map(str, shape[1:])])
        way = ": end it with nn.Flatten()" if len(shape) > 2 and shape[0] == 2 and set(shape[2:]) == {1} else ""
        raise refuse(f"{wanted} ({described}){way}")
    if not output.is_floating_point():
        raise refuse(f"{wanted} {str(output.dtype).removeprefix('torch.')}: classes, not logits")
    if shape[1] != num_classes:
        raise refuse(
            f"a network with as many outputs as the data has classes; it has {shape[1]} outputs, the data has "
            f"{num_classes} classes: give the last layer num_classes outputs (teacher.options passes arguments)"
        )


def _described(output: object) -> str:
    """Return a few words for what is no tensor: a tuple of 2 (GoogLeNetOutputs), a dict of logits, aux."""
    if isinstance(output, dict):
        return f"a dict of {', '.join(map(str, output))}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"
