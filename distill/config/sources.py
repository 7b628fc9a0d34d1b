"""The source of a module, and of the modules beside it that it imports: found without importing anything.

"Beside it" is the folder that Python would import it from; of an installed one, its own package.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

INSTALLED = ("site-packages", "dist-packages")
OWN = "distill"  # what this package computes has a version of its own
DIGITS = 16


def import_folder(module: str) -> str | None:
    """Return the folder that `module` is imported from here, the working folder first; None where it is installed, or
    is not found."""
    found = _root_of(module, folder=None)
    return None if found is None or _is_installed(found) else found


def describe_module(module: str, folder: str | None) -> str | None:
    """Return the modules that `module`, found in `folder` or as Python does, consists of and digits of their source.

    None where it is not found: it is compiled in, or importing it will say what is wrong.
    """
    root = _root_of(module, folder)
    if root is None:
        return None
    files = _with_local_imports(module, root)
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return f"{', '.join(sorted(files))}; content {digest.hexdigest()[:DIGITS]}"


def _root_of(module: str, folder: str | None) -> str | None:
    """Return the folder on Python's path that has the module's outermost package."""
    for place in [folder or os.getcwd(), *sys.path]:
        absolute = str(Path(place).absolute())
        if _find(module, absolute) is not None:
            return absolute
    return None


def _is_installed(root: str) -> bool:
    library = Path(os.__file__).parent
    return any(part in INSTALLED for part in Path(root).parts) or Path(root).resolve() == library.resolve()


def _find(module: str, root: str) -> ModuleSpec | None:
    """Return where a module is below `root`, without running the packages around it."""
    path, spec = [root], None
    names = module.split(".")
    for depth in range(1, len(names) + 1):
        spec = PathFinder.find_spec(".".join(names[:depth]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _with_local_imports(module: str, root: str) -> dict[str, bytes]:
    """Return the content of the files of `module`, the packages around it, and all that they import below `root`."""
    own_package = module.partition(".")[0] if _is_installed(root) else None
    files: dict[str, bytes] = {}
    waiting, seen = [*_and_around(module)], set[str]()
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in seen or top == OWN or (own_package is not None and top != own_package):
            continue
        seen.add(name)
        spec = _find(name, root)
        if spec is None or not spec.has_location or spec.origin is None:
            continue  # not one of these, or a folder without a file of its own
        files[name] = Path(spec.origin).read_bytes()
        package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        for imported in _imports(files[name], package):
            waiting += _and_around(imported)
    return files


def _and_around(module: str) -> list[str]:
    """The module and the packages that Python imports before it."""
    names = module.split(".")
    return [".".join(names[:depth]) for depth in range(1, len(names) + 1)]


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Every dotted name that a source imports; of `from a import b` both a and a.b."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # compiled, or importing it will say what is wrong
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*around, node.module or ""]))
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
