"""Reads a teacher's weights, from a file or by name, into its architecture. Never runs code from a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.aliases import for_all_names
from distill.errors import ConfigError, one_of
from distill.paths import expanded
from distill.teachers.architectures import import_timm

_WRAPPERS = ("state_dict", "model", "model_state")  # where checkpoints hide the weights
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
_SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")


def load_teacher_weights(model: nn.Module, source: str, name: str, weights: str) -> None:
    """Load `weights`, a file or the name of published weights such as "DEFAULT", into `model`.

    Something with a "/" or a known file ending is a file. Raises ConfigError on teacher.weights.
    """
    _load_state(model, _find_state(model, source, name, weights), weights)


def _find_state(model: nn.Module, source: str, name: str, weights: str) -> dict[str, Tensor]:
    if _is_published(source, weights):
        return pretrained_weights(source, name, weights)
    return _unwrap(_read(weights), weights, model)


def _is_published(source: str, weights: str) -> bool:
    looks_like_file = "/" in weights or weights.endswith(_SUFFIXES) or Path(weights).is_file()
    return source in {"torchvision", "timm"} and not looks_like_file


def options_for_weights(source: str, name: str, weights: str | None) -> dict[str, object]:
    """Return the options of build_architecture() without which `weights` would not mean what they were trained for.

    torchvision's own weights of GoogLeNet and Inception transform their input from ImageNet's mean and deviation.
    """
    transformed = source == "torchvision" and name in {"googlenet", "inception_v3"}
    return {"transform_input": True} if transformed and weights and _is_published(source, weights) else {}


def load_backbone(model: nn.Module, source: str, name: str, weights: str) -> tuple[str, ...]:
    """Load all of `weights` that fits and return the names that keep their first values: a head for other classes.

    For fine-tuning on new data. Raises ConfigError on teacher.weights unless at least half of the tensors fit.
    """
    state = _find_state(model, source, name, weights)
    own = model.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if 2 * len(fitting) < len(own):
        allowed = f"weights of this architecture; only {len(fitting)} of its {len(own)} tensors are among them"
        raise ConfigError("teacher.weights", weights, allowed)
    model.load_state_dict(fitting, strict=False)
    return tuple(key for key in own if key not in fitting and not key.endswith("num_batches_tracked"))


def load_weights(model: nn.Module, weights: str) -> None:
    """Load the file `weights`, safetensors or a torch checkpoint of tensors, into `model`; names and shapes must match.

    Raises ConfigError on teacher.weights if the file cannot be read or does not fit.
    """
    _load_state(model, _unwrap(_read(weights), weights, model), weights)


def pretrained_weights(source: str, name: str, which: str) -> dict[str, Tensor]:
    """Return the published weights `which` of an architecture; downloads them unless they are cached.

    torchvision: a member of the weights enum (IMAGENET1K_V2) or DEFAULT; timm: a pretrained tag or DEFAULT.
    Raises ConfigError on teacher.weights for an unknown name or a failed download.
    """
    if source == "torchvision":
        return _torchvision_weights(name, which)
    if source == "timm":
        return _timm_weights(name, which)
    raise ConfigError("teacher.weights", which, f"a file: there are no published weights for source {source!r}")


def _torchvision_weights(name: str, which: str) -> dict[str, Tensor]:
    from torchvision import models

    choices = models.get_model_weights(name)
    if which not in choices.__members__:
        raise ConfigError("teacher.weights", which, f"a file, or {one_of(choices.__members__, which)}")
    try:
        # Building the model, not reading the file, follows renamed keys (DenseNet) and dropped heads (GoogLeNet).
        built = models.get_model(name, weights=choices[which], progress=False)
    except (OSError, RuntimeError) as error:
        raise _download_failed(which, error) from error
    return cast(dict[str, Tensor], built.state_dict())


def _timm_weights(name: str, which: str) -> dict[str, Tensor]:
    timm = import_timm("teacher.weights")
    bare = name.partition(".")[0]
    tagged = name if which == "DEFAULT" else f"{bare}.{which}"
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*")]
    if not timm.is_model_pretrained(tagged):
        raise ConfigError("teacher.weights", which, f"a file, or {one_of(['DEFAULT', *filter(None, tags)], which)}")
    try:
        built = timm.create_model(tagged, pretrained=True)
    except Exception as error:  # the hub client's errors share no base class
        raise _download_failed(which, error) from error
    return cast(dict[str, Tensor], built.state_dict())


def _download_failed(which: str, error: Exception) -> ConfigError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ConfigError(
        "teacher.weights",
        which,
        f"weights that can be downloaded: there seems to be no network ({reason}); give a file",
    )


def _read(weights: str) -> object:
    path = expanded(weights)
    if not path.is_file():
        raise ConfigError("teacher.weights", weights, "a file that exists (.safetensors, or one written by torch.save)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            "teacher.weights",
            weights,
            "a file of tensors only; this one is damaged, or needs code to be read: save model.state_dict() instead",
        ) from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError("teacher.weights", weights, f"a readable file of tensors ({reason})") from error


def _unwrap(checkpoint: object, weights: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors by name: out of a checkpoint's wrapping, and without prefixes that `model` does not have."""
    state: Any = checkpoint
    while isinstance(state, Mapping) and (inner := [k for k in _WRAPPERS if isinstance(state.get(k), Mapping)]):
        state = state[inner[0]]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = list(state)[:5] if isinstance(state, Mapping) else type(state).__name__
        allowed = f"a state_dict, bare or under one of {', '.join(_WRAPPERS)}; found {found}"
        raise ConfigError("teacher.weights", weights, allowed)
    own = model.state_dict()
    while (prefix := _common_prefix(state)) and not any(key.startswith(prefix) for key in own):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _common_prefix(state: Mapping[str, Tensor]) -> str:
    return next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)), "")


def _load_state(model: nn.Module, state: Mapping[str, Tensor], weights: str) -> None:
    own = model.state_dict()
    state = for_all_names(own, state)
    # Files older than torch 0.4.1 have no such counters, and eval() does not use them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unexpected or misshaped:
        problems = _problems(own, state, missing=missing, unexpected=unexpected, misshaped=misshaped)
        raise ConfigError("teacher.weights", weights, f"weights of this architecture; {problems}")
    model.load_state_dict(state, strict=False)


def _problems(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    missing: list[str],
    unexpected: list[str],
    misshaped: list[str],
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} missing (first: {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} of {len(state)} unexpected (first: {unexpected[0]})")
    if misshaped:
        first = misshaped[0]
        shapes = f"{tuple(state[first].shape)} given, {tuple(own[first].shape)} needed"
        parts.append(f"{len(misshaped)} of another shape (first: {first}, {shapes})")
    if not missing and not unexpected and _is_head(misshaped, own):
        given, needed = len(state[misshaped[-1]]), len(own[misshaped[-1]])
        parts.append(
            f"only the last layer differs: the weights are for {given} classes, this network has {needed}; "
            f"give a file of weights for {needed} classes"
        )
    return "; ".join(parts)


def _is_head(misshaped: list[str], own: Mapping[str, Tensor]) -> bool:
    """True if the misshaped tensors are just the last layer's (so its number of classes differs)."""
    owners = {key.rpartition(".")[0] for key in misshaped}
    return owners == {next(reversed(list(own))).rpartition(".")[0]}
