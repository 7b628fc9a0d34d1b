"""Finds a network's weights in what a training script saved: under which name, and behind which prefix of their keys.

A checkpoint is dictionaries within dictionaries. Wherever the network's own names are found, bare or with one prefix
before all of them, is a place where its weights may be. The place that has all of them, and nothing else behind the
same prefix, is taken; of several such places the first by `_preference`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.storage.aliases import for_all_names
from distill.teachers.inert import Inert

DEPTH = 5  # of dictionaries within one another; training scripts use two
AVERAGED = {"ema", "swa", "averaged", "average"}  # words in the names of weights averaged over training

# What programs leave among the weights that belongs to no network's function: the counters of batch norms (files older
# than torch 0.4.1 have none, eval() does not use them), of the profiler thop, and of torch's AveragedModel.
COUNTERS = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")
# Heads of GoogLeNet and Inception that serve training from scratch.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def is_counter(key: str) -> bool:
    """Whether a key of a state_dict names something that no output depends on."""
    return key.rpartition(".")[2] in COUNTERS


def missing(own: Mapping[str, Tensor], given: Collection[str]) -> list[str]:
    """Return the network's names that are not `given`; a tensor with several names needs one of them."""
    known = for_all_names(own, {key: own[key] for key in own if key in given})
    return [key for key in own if key not in known and not is_counter(key)]


@dataclass(frozen=True)
class Place:
    """Where in a file weights are: the names of the dictionaries that lead there, and the prefix of their keys.

    `state` has what is behind the prefix, without it; `beside` are the other keys of the same dictionary.
    """

    path: tuple[str, ...]
    prefix: str
    state: Mapping[str, Any] = field(repr=False)
    beside: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return " > ".join(filter(None, (*self.path, f"{self.prefix}*" if self.prefix else ""))) or "the file itself"

    def fits(self, own: Mapping[str, Tensor]) -> int:
        """Return how many of the network's tensors are here in the same shape."""
        return sum(self._fits(key, own) for key in own)

    def is_whole(self, own: Mapping[str, Tensor]) -> bool:
        """Whether all of the network's tensors are here, and nothing else."""
        fitting = {key for key in own if self._fits(key, own)}
        wrong = [key for key in own if key in self.state and key not in fitting and not is_counter(key)]
        return not (wrong or missing(own, fitting) or self.unexpected(own))

    def _fits(self, key: str, own: Mapping[str, Tensor]) -> bool:
        value = self.state.get(key)
        return isinstance(value, Tensor) and value.shape == own[key].shape

    def unexpected(self, own: Mapping[str, Tensor]) -> list[str]:
        """Return the keys of tensors behind the prefix that the network does not have, as far as they matter."""
        return [
            key
            for key, value in self.state.items()
            if isinstance(value, Tensor) and key not in own and not is_counter(key) and not key.startswith(AUXILIARY)
        ]


def find(content: object, own: Mapping[str, Tensor]) -> list[Place]:
    """Return the places of `content` where tensors named as the network's `own` may be, best first.

    With no name in common, these are the dictionaries of tensors; the list is empty where there is none.
    """
    places = [place for path, state in _dictionaries(content, (), set()) for place in _places(path, state, own)]
    return sorted(
        places, key=lambda place: (not place.is_whole(own), -place.fits(own), -_common(place, own), _preference(place))
    )


def _common(place: Place, own: Mapping[str, Tensor]) -> int:
    return len(own.keys() & place.state.keys())


def _dictionaries(
    content: object, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Return every dictionary that names a tensor, or what was not made, once, and the names that lead to it."""
    if not isinstance(content, Mapping | list | tuple) or id(content) in seen or len(path) > DEPTH:
        return
    seen.add(id(content))
    items = content.items() if isinstance(content, Mapping) else ((str(at), item) for at, item in enumerate(content))
    named = {key: value for key, value in items if isinstance(key, str)}
    if any(isinstance(value, Tensor | Inert) for value in named.values()):
        yield path, named
    for key, value in named.items():
        yield from _dictionaries(value, (*path, key), seen)


def _places(path: tuple[str, ...], state: Mapping[str, Any], own: Mapping[str, Tensor]) -> Iterator[Place]:
    """Return a place for each prefix behind which one of the network's names is, or for the one that all keys share."""
    found = Counter(
        key[:start] for key in state for start in _starts(key) if key[start:] in own and not is_counter(key)
    )
    shared = [_shared_prefix(state)] if any(isinstance(value, Tensor) for value in state.values()) else []
    for prefix in found or shared:
        behind = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        yield Place(path, prefix, behind, tuple(key for key in state if not key.startswith(prefix)))


def _starts(key: str) -> list[int]:
    """Return where in a key a name may begin: at its beginning, and after every dot."""
    return [0, *(match.end() for match in re.finditer(r"\.", key))]


def _shared_prefix(state: Mapping[str, Any]) -> str:
    first, *others = [key for key in state if not is_counter(key)] or [""]
    prefixes = [first[:start] for start in _starts(first)]
    return next(prefix for prefix in reversed(prefixes) if all(key.startswith(prefix) for key in others))


def _preference(place: Place) -> tuple[int, int]:
    """Sort averaged weights before those of the last step, then a teacher's, others, a student's; outer before inner.

    Averaged weights are what training scripts that have them evaluate and publish.
    """
    names = [*place.path, *place.prefix.split(".")]
    words = {word for name in names for word in re.split(r"[._-]", name.lower())}
    kinds = [bool(words & AVERAGED), "teacher" in words, "student" not in words, True]
    return kinds.index(True), len(names)
