"""Finds what a setting names: an own thing, an entry point of an installed package, or package.module:attribute.

A package brings a thing by an entry point in its pyproject.toml, here a block loss called huber:

    [project.entry-points."distill.losses"]
    huber = "my_package.losses:huber"

Nothing is imported until it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import ConfigError, one_of

T = TypeVar("T")


def named(setting: str, value: str, own: Mapping[str, T], group: str) -> T:
    """Return what `value` names: one of `own`, an entry point of `group`, or package.module:attribute.

    An own name goes before an entry point of the same name. What comes from outside is returned as it is found: whether
    it is a T is for the caller to see. Raises ConfigError on `setting`, also for what goes wrong in the user's module.
    """
    refuse_unknown(setting, value, own, group)
    if value in own:
        return own[value]
    found = _entry_point(value, group)
    module, attribute = (found.module, found.attr) if found else value.split(":")
    return _imported(setting, value, module, attribute)  # type: ignore[no-any-return]


def refuse_unknown(setting: str, value: str, own: Iterable[str], group: str) -> None:
    """Raise ConfigError on `setting` unless `value` is one of `own`, an entry point of `group` or has the form
    package.module:attribute. Imports nothing."""
    names = [*own]
    if value in names or _is_path(value) or _entry_point(value, group) is not None:
        return
    names += sorted(point.name for point in entry_points(group=group) if point.name not in names)
    from_outside = '"package.module:attribute", with one colon'
    raise ConfigError(setting, value, f"{one_of(names, value)}; or {from_outside}" if names else from_outside)


def module_of(value: str, own: Iterable[str], group: str) -> str | None:
    """Return the module that `value` is imported from; None for an own name, and for what names nothing."""
    if value in own:
        return None
    found = _entry_point(value, group)
    if found is not None:
        return found.module
    return value.partition(":")[0] if _is_path(value) else None


def takes(build: Callable[..., object], name: str) -> bool:
    """Return whether `build` has an argument of that name, or takes any; False where it does not say."""
    try:
        parameters = inspect.signature(build).parameters.values()
    except ValueError:  # a builtin without a signature
        return False
    return any(one.name == name or one.kind is one.VAR_KEYWORD for one in parameters)


def called(
    setting: str, build: Callable[..., T], *arguments: object, options: Mapping[str, object], **keywords: object
) -> T:
    """Return build(*arguments, **keywords, **options). Raises ConfigError on `setting`, which has the options, where it
    does not take them; errors inside it stay what they are."""
    every = {**keywords, **options}
    try:
        inspect.signature(build).bind(*arguments, **every)
    except TypeError as error:
        raise ConfigError(setting, dict(options), f"arguments that are taken ({error})") from error
    except ValueError:  # a builtin without a signature: let the call itself tell
        pass
    return build(*arguments, **every)


def reason(error: BaseException) -> str:
    """Return in one line what went wrong in code from outside, and where: the last place that is not installed."""
    lines = [f"{type(error).__name__}: {error}".splitlines()[0]]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_installed(frame.filename)]
    lines += [f"{Path(frame.filename).name}, line {frame.lineno}" for frame in frames[-1:]]
    return "; ".join(lines)


def _is_installed(file: str) -> bool:
    return "site-packages" in file or Path(file).is_relative_to(Path(__file__).parent)


def _is_path(value: str) -> bool:
    module, _, attribute = value.partition(":")
    return all(name.isidentifier() for name in [*module.split("."), *attribute.split(".")])


def _entry_point(name: str, group: str) -> EntryPoint | None:
    return None if ":" in name else next(iter(entry_points(group=group, name=name)), None)


def _imported(setting: str, value: str, module: str, attribute: str) -> Any:
    try:
        target: Any = importlib.import_module(module)
    except Exception as error:  # whatever stands in the user's file
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        first = (reason.splitlines() or [type(error).__name__])[0]
        raise ConfigError(setting, value, f"a module that can be imported ({first})") from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            public = [choice for choice in dir(target) if not choice.startswith("_")]
            raise ConfigError(setting, value, f"an attribute of {module}: {one_of(public, name)}")
        target = getattr(target, name)
    return target
