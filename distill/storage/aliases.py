"""One tensor under several names of a state dict (a module at two places, tied weights): written once, read for all."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor, nn


def each_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without those that an earlier name holds already."""
    first: dict[Hashable, str] = {}
    return {name: tensor for name, tensor in tensors.items() if first.setdefault(_place(tensor), name) == name}


def for_all_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with a value for every other name that its tensors have in `own`, a network's state dict."""
    given = {_place(own[name]): tensor for name, tensor in state.items() if name in own}
    places = {name: _place(tensor) for name, tensor in own.items()}
    others = {name: given[place] for name, place in places.items() if name not in state and place in given}
    return {**state, **others}


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of which each_once() has left the first names; others may not be missing."""
    module.load_state_dict(versioned(module, for_all_names(module.state_dict(), state)))


def versioned(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict that says to be of the module's own code, as files of tensors alone cannot: some modules
    convert others, or refuse them."""
    own = module.state_dict()
    own.clear()
    own.update(state)
    return own


def memory_of(tensor: Tensor) -> int:
    """Return what tensors that share memory, also where it is only imagined, have in common while they exist."""
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: Tensor) -> Hashable:
    """Return what two names of one tensor have in common."""
    return memory_of(tensor), tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
