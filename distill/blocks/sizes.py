"""Lets every operation read the sizes it needs from a tensor at hand. Knows nothing of cut points.

`n = x.size(0)` in front of the layers and `view(n, -1)` behind them would keep a number alive through the whole
network, and nothing could be cut. All sizes but that of the batch are fixed by the sample.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

BATCHES = (2, 3)  # what is the same in both is a constant; what is k times both, k times the batch

_CONSTANTS = (int, float, str, torch.device)  # bool is an int


def read_at_hand(graph: fx.Graph, root: nn.Module, sample: Tensor) -> None:
    """Rewrite every use of a size by an operation: to a number, or to the batch size of a tensor that is alive there.

    Leaves a network as it is that does not run on batches of other sizes.
    """
    values = [_Sizes(root, graph) for _ in BATCHES]
    try:
        with torch.no_grad():
            for batch, run in zip(BATCHES, values, strict=True):
                run.run(sample.new_zeros((batch, *sample.shape[1:])))
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
        return
    sizes = {node: tuple(run.sizes[node] for run in values) for node in values[0].sizes if node in values[1].sizes}
    known = {node: form for node, pair in sizes.items() if (form := _form(*pair)) is not None}
    multiples = _multiples(values)
    for user in list(graph.nodes):
        if user not in known:
            for size in [node for node in user.all_input_nodes if node in known]:
                _rewrite(user, size, known[size], multiples)
    for node in reversed(list(graph.nodes)):
        if node in known and not node.users:
            graph.erase_node(node)


class _Sizes(fx.Interpreter):
    """Runs a graph and keeps the values that are no tensors, and the leading size of those that are."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.sizes: dict[fx.Node, Any] = {}
        self.leading: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.dim() > 0 and n.op != "get_attr":
            self.leading[n] = len(result)
        elif n.op in {"call_function", "call_method"} and _is_size(result):
            self.sizes[n] = result
        return result


def _is_size(value: object) -> bool:
    if isinstance(value, tuple | list):
        return len(value) > 0 and all(map(_is_size, value))
    return isinstance(value, _CONSTANTS)


class _Batches:
    """So many times the batch size."""

    def __init__(self, times: int) -> None:
        self.times = times


def _form(one: Any, other: Any) -> Any:
    """Return what a size is at any batch size: a constant, _Batches, a tuple of them; None where it is neither."""
    if isinstance(one, tuple | list):
        if not isinstance(other, tuple | list) or len(one) != len(other):
            return None
        parts = tuple(_form(*pair) for pair in zip(one, other, strict=True))
        return None if any(part is None for part in parts) else parts
    if one == other:
        return one
    times = _times(one, other)
    return None if times is None else _Batches(times)


def _times(one: Any, other: Any) -> int | None:
    fits = isinstance(one, int) and isinstance(other, int) and one > 0 and one * BATCHES[1] == other * BATCHES[0]
    return one // BATCHES[0] if fits and one % BATCHES[0] == 0 else None


def _multiples(values: Sequence[_Sizes]) -> Mapping[fx.Node, int]:
    """Return the tensors whose leading size is a multiple of the batch size, and which."""
    one, other = (run.leading for run in values)
    found = {node: _times(one[node], other[node]) for node in one if node in other}
    return {node: times for node, times in found.items() if times}


def _rewrite(user: fx.Node, size: fx.Node, form: Any, multiples: Mapping[fx.Node, int]) -> None:
    """Let `user` read `size` from a tensor at hand."""
    if not _varies(form):
        _replace(user, size, form)
        return
    tensor = next((node for node in _at_hand(user) if node in multiples), None)
    if tensor is None:
        return
    with user.graph.inserting_before(user):
        rows = user.graph.call_method("size", (tensor, 0))
        rows.meta = dict(user.meta)
        _replace(user, size, _expression(form, rows, multiples[tensor]))


def _varies(form: Any) -> bool:
    return any(map(_varies, form)) if isinstance(form, tuple) else isinstance(form, _Batches)


def _at_hand(user: fx.Node) -> Iterator[fx.Node]:
    """Yield what `user` reads, then what is alive before it, the latest first."""
    yield from user.all_input_nodes
    nodes = list(user.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    for node in reversed(nodes[: place[user]]):
        if any(place.get(reader, -1) >= place[user] for reader in node.users):
            yield node


def _expression(form: Any, rows: fx.Node, times: int) -> Any:
    """Return `form` in terms of `rows`, which are `times` the batch size; new operations go where the graph inserts."""
    if isinstance(form, tuple):
        return tuple(_expression(part, rows, times) for part in form)
    if not isinstance(form, _Batches) or form.times == times:
        return form if not isinstance(form, _Batches) else rows
    batch = rows if times == 1 else _call(operator.floordiv, rows, times)
    return batch if form.times == 1 else _call(operator.mul, batch, form.times)


def _call(function: Any, rows: fx.Node, number: int) -> fx.Node:
    node = rows.graph.call_function(function, (rows, number))
    node.meta = dict(rows.meta)
    return node


def _replace(user: fx.Node, size: fx.Node, value: Any) -> None:
    user.args = fx.map_arg(user.args, lambda node: value if node is size else node)
    user.kwargs = fx.map_arg(user.kwargs, lambda node: value if node is size else node)
