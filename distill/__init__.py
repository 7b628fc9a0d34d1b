"""distill: compress trained networks by parallel blockwise knowledge distillation.

As a program: `python -m distill`. As a library: cut(), compress(), load_student() and report(); docs/api.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from distill.version import __version__

if TYPE_CHECKING:
    from distill.api import Result, compress, cut, report
    from distill.storage.packed import load_packed
    from distill.student.files import load_student

__all__ = ["Result", "__version__", "compress", "cut", "load_packed", "load_student", "report"]

_FROM = dict.fromkeys(("Result", "compress", "cut", "report"), "distill.api")
_FROM["load_student"] = "distill.student.files"
_FROM["load_packed"] = "distill.storage.packed"


def __getattr__(name: str) -> object:
    """Import what is asked for only then: the launcher and the schema need no torch."""
    if name in _FROM:
        return getattr(import_module(_FROM[name]), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
