"""The user's list of modules that are to be blocks: patterns expanded, mistakes named. Runs nothing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from distill.errors import ConfigError

_WILDCARDS = frozenset("*?[")


def expand(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the module paths that `patterns` stand for, in the list's order and within a pattern the network's.

    A pattern is a path with a shell's wildcards, none of which stands for a dot: "layer*.*" are the units of a ResNet's
    stages, not what is in them. What has no wildcard is kept, existing or not. Raises ConfigError on blocks.modules if
    a pattern matches no module.
    """
    paths = _paths(model)
    expanded: list[str] = []
    for pattern in patterns:
        found = [path for path in paths if _matches(path, pattern)] if _WILDCARDS & set(pattern) else [pattern]
        if not found:
            allowed = f"a pattern that matches the path of a module, such as {', '.join(_near(pattern, paths))}"
            raise ConfigError("blocks.modules", pattern, allowed)
        expanded += found
    return expanded


def check_listed(model: nn.Module, modules: Sequence[str]) -> None:
    """Raise ConfigError on blocks.modules if a path names nothing, stands twice, lies inside another or names a module
    that shares weights with the rest of the network."""
    paths = _paths(model)
    if not modules:
        raise ConfigError("blocks.modules", list(modules), f"a list of module paths, such as {paths[:3]}")
    for path in modules:
        if path not in paths:
            allowed = f"the path of a module, such as {', '.join(_near(path, paths))}"
            raise ConfigError("blocks.modules", path, allowed)
        if modules.count(path) > 1:
            raise ConfigError("blocks.modules", path, "each module once; this one stands twice in the list")
        outer = [other for other in modules if path.startswith(other + ".")]
        if outer:
            raise ConfigError("blocks.modules", path, f"modules that do not overlap; this one lies inside {outer[0]}")
        shared = _shared_with(model, path)
        if shared is not None:
            allowed = f"a module with weights of its own; its weights are shared with {shared}"
            raise ConfigError("blocks.modules", path, allowed)


def _paths(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules() if path]


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _near(path: str, paths: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(path, paths, n=3) or list(paths[:3])


def _shared_with(model: nn.Module, path: str) -> str | None:
    """Return the name of a parameter outside the module at `path` that is also one of its own, or None."""
    own = {id(parameter) for parameter in model.get_submodule(path).parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return next((name for name, one in every if id(one) in own and not name.startswith(path + ".")), None)
