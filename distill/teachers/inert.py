"""Reads pickles without running anything that they ask for: the `pickle_module` for torch.load().

A pickle is a program that may call whatever it can name. Here it can name only what rebuilds tensors and dictionaries;
any other name becomes a class of its own, whose objects take everything and do nothing. So argparse.Namespace, NumPy's
numbers, or a whole configuration beside the weights of a checkpoint are passed over, and so is what a malicious file
wants to run.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import torch


class Inert:
    """Stands for something that a file asks for and that was not made."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        return super().__new__(cls)

    def __call__(self, *_: object, **__: object) -> Inert:
        return self

    def _ignore(self, *_: object, **__: object) -> None:
        """Take what a pickle may do to an object: set its state or its items, or add to it."""

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore


def kind_of(value: object) -> str:
    """Return the full name of a value's class, or of what an inert one stands for."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class _Sealed:
    """A function that a pickle may call, but not write attributes to, as it could to the function itself."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("it tries to change a function")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: object) -> Any:
    """Return the tensor, without hooks and gradients; inert where its storage is."""
    if isinstance(storage, Inert):
        return storage
    return torch._utils._rebuild_tensor(storage, offset, size, stride)  # type: ignore[no-untyped-call]


def _data(data: Any, *_: object) -> Any:
    """Return what a parameter wraps."""
    return data


def _without_class(rebuild: Any, _: object, arguments: Any, __: object) -> Any:
    """Return a tensor of a subclass as a plain one; inert where the subclass is built by code of its own."""
    return rebuild(*arguments) if isinstance(rebuild, _Sealed) else Inert()


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _Sealed(lambda *_: {}),
    ("torch._utils", "_rebuild_tensor"): _Sealed(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Sealed(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Sealed(_data),
    ("torch._utils", "_rebuild_parameter_with_state"): _Sealed(_data),
    ("torch._tensor", "_rebuild_from_type_v2"): _Sealed(_without_class),
}


class Unpickler(pickle.Unpickler):
    """torch.load() adds how storages are read, and which types they have; every other name comes here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "UntypedStorage"):
            raise pickle.UnpicklingError("it holds tensors of a type newer than bfloat16: save them as float32")
        known = _KNOWN.get((module, name))
        return known or type(name, (Inert,), {"__module__": module, "__qualname__": name})


def load(file: BinaryIO, **options: Any) -> Any:
    """Return the next object of a pickle; what torch.load() reads older files' headers with."""
    return Unpickler(file, **options).load()
