"""Loads weights, from a file or by name, into the architecture that they belong to, or says why they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.storage.aliases import for_all_names, versioned
from distill.storage.paths import expanded
from distill.teachers.checkpoint_file import SAVE, read
from distill.teachers.inert import Inert, kind_of
from distill.teachers.published import Preprocessing, name_of_file, pretrained_weights, published_preprocessing
from distill.teachers.unwrapping import Place, find, is_counter, missing

log = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")


def load_teacher_weights(model: nn.Module, source: str, name: str, weights: str) -> None:
    """Load `weights`, a file or the name of published weights such as "DEFAULT", into `model`.

    Something with a "/" or a known file ending is a file. Raises ConfigError on teacher.weights.
    """
    _load_state(model, _find_state(model, source, name, weights), weights)


def load_weights(model: nn.Module, weights: str) -> None:
    """Load the file `weights`, safetensors or a torch checkpoint of tensors, into `model`; names and shapes must match.

    They may be in dictionaries, and behind a prefix of all their names; what is chosen and what is left out is logged.
    Raises ConfigError on teacher.weights if the file cannot be read or does not fit.
    """
    _load_state(model, _unwrap(weights, model), weights)


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
    _refuse_unusable(own, fitting, weights)
    model.load_state_dict(versioned(model, fitting), strict=False)
    return tuple(key for key in own if key not in fitting and not is_counter(key))


def is_published(source: str, weights: str) -> bool:
    """Whether `weights` names published weights of a registry, and not a file."""
    looks_like_file = "/" in weights or weights.endswith(_SUFFIXES) or expanded(weights).is_file()
    return source in {"torchvision", "timm"} and not looks_like_file


def expected_preprocessing(source: str, name: str, weights: str) -> Preprocessing | None:
    """Return how `weights` of a registry's architecture expect images, as far as the registry tells.

    A file for one of timm's architectures counts as trained by timm; torchvision's own are known by their names.
    Raises ConfigError on teacher.name or teacher.weights for an unknown name.
    """
    return published_preprocessing(source, name, _published_name(source, name, weights))


def options_for_weights(source: str, name: str, weights: str | None) -> dict[str, object]:
    """Return the options of build_architecture() without which `weights` would not mean what they were trained for.

    torchvision's own weights of GoogLeNet and Inception transform their input from ImageNet's mean and deviation.
    """
    transformed = source == "torchvision" and name in {"googlenet", "inception_v3"}
    return {"transform_input": True} if transformed and weights and _published_name(source, name, weights) else {}


def _published_name(source: str, name: str, weights: str) -> str | None:
    """Return the name of published weights, which may be given as a file that was downloaded by hand."""
    if is_published(source, weights):
        return weights
    return name_of_file(name, weights) if source == "torchvision" else None


def _find_state(model: nn.Module, source: str, name: str, weights: str) -> Mapping[str, Tensor]:
    if is_published(source, weights):
        return pretrained_weights(source, name, weights)
    return _unwrap(weights, model)


def _unwrap(weights: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file by the network's names for them, from the best place in it."""
    content = read(weights)
    own = model.state_dict()
    places = find(content, own)
    if not places:
        raise ConfigError("teacher.weights", weights, f"a state_dict, bare or in dictionaries; {_found(content)}")
    place = places[0]
    others = [str(other) for other in places[1:] if other.is_whole(own)]
    if place.is_whole(own):
        _tell(place, others, own, weights)
    inert = [f"{key} is a {kind_of(place.state[key])}" for key in own if isinstance(place.state.get(key), Inert)]
    if inert:
        raise ConfigError("teacher.weights", weights, f"plain tensors of numbers; {len(inert)} are not: {inert[0]}")
    return {key: value for key, value in place.state.items() if isinstance(value, Tensor)}


def _found(content: object) -> str:
    """Say what a file without tensors holds instead."""
    items = content.items() if isinstance(content, Mapping) else [("", content)]
    pickled = [(f"under {key!r} " if key else "") + kind_of(value) for key, value in items if isinstance(value, Inert)]
    if pickled:
        return (
            f"found a pickled object ({pickled[0]}), which could run any code; save model.state_dict() instead: {SAVE}"
        )
    return f"found {list(content)[:5] if isinstance(content, Mapping) else kind_of(content)}"


def _tell(place: Place, others: list[str], own: Mapping[str, Tensor], weights: str) -> None:
    """Log what was chosen where the file leaves a choice, and which of its tensors are left out."""
    if others:
        log.info("teacher: of %s the weights under %s are taken, not those under %s", weights, place, ", ".join(others))
    elif place.path or place.prefix:
        log.info("teacher: the weights are under %s in %s", place, weights)
    left_out = [key for key in place.state if key not in own and not is_counter(key)]
    left_out += [key for key in place.beside if not is_counter(key)]
    if left_out and not others:
        log.info("teacher: left out, for the network has no such names: %s", _some(left_out))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


def _load_state(model: nn.Module, state: Mapping[str, Tensor], weights: str) -> None:
    own = model.state_dict()
    state = for_all_names(own, state)
    lacking = missing(own, state)
    unexpected = Place((), "", state, ()).unexpected(own)
    misshaped = [key for key in own if key in state and own[key].shape != state[key].shape and not is_counter(key)]
    if lacking or unexpected or misshaped:
        problems = _problems(own, state, missing=lacking, unexpected=unexpected, misshaped=misshaped)
        raise ConfigError("teacher.weights", weights, f"weights of this architecture; {problems}")
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    _refuse_unusable(own, fitting, weights)
    model.load_state_dict(versioned(model, fitting), strict=False)


def _refuse_unusable(own: Mapping[str, Tensor], state: Mapping[str, Tensor], weights: str) -> None:
    """Refuse what would be loaded without a word and mean something else; say it where precision changes."""
    for key, value in state.items():
        is_plain = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        if not is_plain or value.is_floating_point() != own[key].is_floating_point() or value.is_complex():
            form = f"{str(value.dtype).removeprefix('torch.')}, {str(value.layout).removeprefix('torch.')}"
            raise ConfigError(
                "teacher.weights", weights, f"dense floating-point weights, not quantized ones; {key} is {form}"
            )
        if not torch.isfinite(value).all():
            raise ConfigError(
                "teacher.weights", weights, f"finite numbers; {key} has NaN or infinity: training diverged"
            )
    cast = sorted({str(value.dtype)[6:] for key, value in state.items() if value.dtype != own[key].dtype})
    if cast:
        log.info("teacher: weights in %s are computed with in %s", " and ".join(cast), _precision(own))


def _precision(own: Mapping[str, Tensor]) -> str:
    return next((str(value.dtype)[6:] for value in own.values() if value.is_floating_point()), "float32")


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
    if unexpected and not missing and not misshaped:
        parts.append(
            "all that the network has is there: it is a larger network's file, or has more than a network in it, "
            "which must be taken out first"
        )
    if not missing and not unexpected and _is_head(misshaped, own):
        given, needed = len(state[misshaped[-1]]), len(own[misshaped[-1]])
        parts.append(
            f"only the last layer differs: the weights are for {given} classes, this network has {needed}; "
            f"give a file of weights for {needed} classes, or train a new last layer: teacher.fit.epochs=N"
        )
    return "; ".join(parts)


def _is_head(misshaped: list[str], own: Mapping[str, Tensor]) -> bool:
    """True if the misshaped tensors are just the last layer's (so its number of classes differs)."""
    owners = {key.rpartition(".")[0] for key in misshaped}
    return owners == {next(reversed(list(own))).rpartition(".")[0]}
