"""Builds an untrained network from a source and a name. Knows nothing of weights or configuration objects."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import nn

from distill.blocks.memory_format import without_overlaps
from distill.errors import ConfigError, install, one_of
from distill.extensions import called, named, takes
from distill.teachers.cifar_resnet import UNITS_PER_STAGE, cifar_resnet
from distill.teachers.cifar_vgg import LAYERS, cifar_vgg

SOURCES = ("cifar", "torchvision", "timm", "factory")
NO_OPTIONS: Mapping[str, object] = MappingProxyType({})

# GoogLeNet and Inception: auxiliary heads serve training from scratch only; naming init_weights silences a warning.
_QUIET_OPTIONS: dict[str, dict[str, object]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build_architecture(
    *,
    source: str,
    name: str,
    num_classes: int,
    factory: str | None = None,
    options: Mapping[str, object] = NO_OPTIONS,
) -> nn.Module:
    """Return a freshly initialised network with `num_classes` outputs, on the CPU and in training mode.

    `options` are extra keyword arguments of the architecture. Raises ConfigError on teacher.source, teacher.name,
    teacher.factory or teacher.options.
    """
    if source == "factory":
        return without_overlaps(_factory(factory, num_classes, options))
    if source not in SOURCES:
        raise ConfigError("teacher.source", source, one_of(SOURCES, source))
    build = {"cifar": _cifar, "torchvision": _torchvision, "timm": _timm}[source]
    return without_overlaps(build(name, num_classes, options))


def check_name(source: str, name: str) -> None:
    """Raise ConfigError on teacher.name unless the registry `source` has that architecture; "" is none of them."""
    if source == "timm":
        timm = import_timm("teacher.source")
        if not timm.is_model(name):
            raise ConfigError("teacher.name", name, _nearest_timm(timm, name))
        bare, _, tag = name.partition(".")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*")]
        if tag and tag not in tags:
            raise ConfigError("teacher.name", name, f"{bare}, or {one_of([f'{bare}.{each}' for each in tags], name)}")
    elif source in ("cifar", "torchvision"):
        known = _names(source)
        if name not in known:
            raise ConfigError("teacher.name", name, one_of(known, name))


def registries_of(name: str) -> list[str]:
    """Return the sources that have an architecture of that name, as far as they are installed."""
    found = [source for source in ("cifar", "torchvision") if name in _names(source)]
    try:
        timm = import_timm("teacher.source")
    except ConfigError:
        return found
    return [*found, "timm"] if timm.is_model(name) else found


def _names(source: str) -> list[str]:
    if source == "cifar":
        return [*UNITS_PER_STAGE, *LAYERS]
    from torchvision import models

    return list(models.list_models(module=models))


def _cifar(name: str, num_classes: int, options: Mapping[str, object]) -> nn.Module:
    check_name("cifar", name)
    build: Callable[..., nn.Module] = cifar_resnet if name in UNITS_PER_STAGE else cifar_vgg
    return called("teacher.options", build, name, options=options, num_classes=num_classes)


def _torchvision(name: str, num_classes: int, options: Mapping[str, object]) -> nn.Module:
    from torchvision import models

    check_name("torchvision", name)
    build = models.get_model_builder(name)
    merged = {**_QUIET_OPTIONS.get(name, {}), **options}
    with _blamed(options):
        model: nn.Module = called(
            "teacher.options", build, options={"weights": None, **merged}, num_classes=num_classes
        )
        return model


def _timm(name: str, num_classes: int, options: Mapping[str, object]) -> nn.Module:
    timm = import_timm("teacher.source")
    check_name("timm", name)
    with _blamed(options):
        every = {"pretrained": False, **options}
        model: nn.Module = called("teacher.options", timm.create_model, name, options=every, num_classes=num_classes)
        return model


@contextmanager
def _blamed(options: Mapping[str, object]) -> Iterator[None]:
    """Turn what a registry's architecture says to options, often deep inside, into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if not options:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError("teacher.options", dict(options), f"what the architecture takes ({reason})") from error


def import_timm(setting: str) -> Any:
    """Return the module timm, or raise a ConfigError on `setting` that says how to install it."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(setting, "timm", f"the package timm: {install('timm')}") from error


def _nearest_timm(timm: Any, name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, timm.list_models(), n=5)
    return f"a name from timm.list_models(){': ' + ', '.join(near) if near else ''}"


def _factory(factory: str | None, num_classes: int, options: Mapping[str, object]) -> nn.Module:
    build = _import_factory(factory)
    keywords = {"num_classes": num_classes} if takes(build, "num_classes") else {}
    model = called("teacher.options", build, options=options, **keywords)
    if not isinstance(model, nn.Module):
        raise ConfigError("teacher.factory", factory, f"a function that returns a torch.nn.Module, not {type(model)}")
    return model


def _import_factory(factory: str | None) -> Callable[..., object]:
    target: Any = named("teacher.factory", factory or "", {}, "distill.teachers")
    if not callable(target):
        raise ConfigError("teacher.factory", factory, f"something that can be called, not {type(target)}")
    return target  # type: ignore[no-any-return]
