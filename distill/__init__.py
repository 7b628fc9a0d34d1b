"""distill: compress trained convolutional networks by parallel blockwise knowledge distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.student.files import load_student

__version__ = "0.1.0"
__all__ = ["__version__", "load_student"]


def __getattr__(name: str) -> object:
    """Import load_student only when it is asked for: the launcher and the schema need no torch."""
    if name == "load_student":
        from distill.student.files import load_student

        return load_student
    raise AttributeError(f"module 'distill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
