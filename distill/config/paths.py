"""Paths as they are typed, made whole when a configuration is composed: it means the same from any folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.config.outside import TEACHER, code_folder
from distill.config.sources import import_folder

ALWAYS = (("cache", "dir"), ("run", "dir"))


def make_absolute(plain: Mapping[str, Any]) -> None:
    """Make every path of a configuration absolute, in place, and name the folders of a teacher's factory and of what
    else comes from outside.

    Names that are no paths, of published weights or of sets on a hub, stay.
    """
    for section, name in ALWAYS:
        _change(plain, section, name)
    data, teacher, run = _section(plain, "data"), _section(plain, "teacher"), _section(plain, "run")
    if data.get("name") != "hf" or _is_local_set(data.get("root")):
        _change(plain, "data", "root")
    if _is_file(teacher.get("weights")):
        _change(plain, "teacher", "weights")
    for owner, name in ((teacher, "folder"), (run, "code")):
        if isinstance(owner.get(name), str):  # Python imports from it as it is
            owner[name] = str(Path(os.path.expanduser(owner[name])).absolute())
    if "code" in run and run["code"] is None:
        run["code"] = code_folder(plain)
    module = TEACHER.module(teacher.get("factory"))
    if teacher.get("source") == "factory" and module is not None and not teacher.get("folder"):
        teacher["folder"] = import_folder(module)


def whole(path: str) -> str:
    """Return the path as an absolute one; what it leads through, links and "..", stays, and so does a home's ~, which
    means the same from any folder."""
    return path if os.path.expanduser(path) != path else str(Path(path).absolute())


def _is_file(weights: object) -> bool:
    """Whether these weights are a file, not published ones, which have a name alone."""
    return isinstance(weights, str) and ("/" in weights or weights.startswith("~") or os.path.isfile(weights))


def _is_local_set(root: object) -> bool:
    """Whether this is a folder or file of parquet, not a set on the hub: that is a name, or an owner/name."""
    if not isinstance(root, str):
        return False
    return root.startswith(("/", ".", "~")) or root.endswith(".parquet") or root.count("/") > 1 or os.path.exists(root)


def _section(plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = plain.get(name)
    return found if isinstance(found, dict) else {}


def _change(plain: Mapping[str, Any], section: str, name: str) -> None:
    value = _section(plain, section).get(name)
    if isinstance(value, str) and value:
        _section(plain, section)[name] = whole(value)
