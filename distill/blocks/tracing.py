"""Turns a network into its finest straight-line segments with torch.fx. Knows nothing of blocks or granularities.

A cut point is a place in the order of operations where exactly one value is alive and that value is one tensor. What
lies between two cut points is a segment: one tensor in, one tensor out. The traced network is a copy of the module
tree that shares all tensors with the original, is free of in-place operations, and gives bitwise the same results.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from distill.blocks.chain import Boundary, agree, share_tensors, switch_off_in_place
from distill.blocks.sizes import read_at_hand

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

# operator.iadd(x, y) writes into x; operator.add(x, y) does not.
_OUT_OF_PLACE: Mapping[Callable[..., Any], Callable[..., Any]] = {
    getattr(operator, "i" + name): getattr(operator, target)
    for name, target in {
        **{name: name for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "xor")},
        **{"and": "and_", "or": "or_", "lshift": "lshift", "rshift": "rshift"},
    }.items()
}


class UntraceableError(Exception):
    """The network cannot be traced; the message's first line says why."""


@dataclass(frozen=True, eq=False)
class Segment:
    """The operations between two neighbouring cut points."""

    nodes: tuple[fx.Node, ...]  # in order; parameters that an operation reads stand before it
    body: tuple[fx.Node, ...]  # the operations among them that lead to the result: no parameters, no assertions
    source: fx.Node  # the one tensor that comes in
    result: fx.Node  # the one tensor that goes out
    branches: bool  # True if somewhere inside two activations are alive: a skip, a gate, parallel paths


MODULE_STACK = "nn_module_stack"  # torch.fx's name for it in what it knows of an operation


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced network: its module tree, its segments in order and the form of every tensor on the sample."""

    root: nn.Module
    segments: tuple[Segment, ...]
    forms: Mapping[fx.Node, Boundary]  # tensors only

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that `node` calls, or None if it does not call one."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def module_stack(node: fx.Node) -> list[tuple[str, str, type]]:
    """Return the modules around an operation from the outermost in: (key of this very call, path, class)."""
    return [(key, path, kind) for key, (path, kind) in node.meta.get(MODULE_STACK, {}).items()]


def trace(model: nn.Module, sample: Tensor, output: Tensor) -> Trace:
    """Return the segments of `model`, which must be in eval mode and gives `output` for `sample` (B, ...).

    Raises UntraceableError if torch.fx cannot follow the network or would get another result.
    """
    root = share_tensors(model)
    graph = symbolic_graph(root)
    _remove_in_place(graph, root)
    read_at_hand(graph, root, sample)
    _settle(graph)
    values = _Recorder(root, graph)
    with torch.no_grad():
        try:
            result = values.run(sample)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UntraceableError(f"the traced network fails: {error}") from error
    if not agree(result, output):
        raise UntraceableError("the traced network gives another result than the network itself")
    segments = tuple(_segments(graph, root, values))
    if not segments:
        raise UntraceableError("it gives back its input")
    return Trace(root, segments, values.forms)


class _Tracer(fx.Tracer):
    """Keeps the layers of torch.nn, and of classes derived from them, whole; reads shapes of parameters as numbers."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, CONTAINERS):
            return False
        kinds = [kind for kind in type(m).__mro__ if kind is not nn.Module]
        return any(kind.__module__.startswith(("torch.nn.", "torch.ao.nn.")) for kind in kinds)


def symbolic_graph(root: nn.Module) -> fx.Graph:
    """Trace `root` as a function of its first argument; the others keep their defaults."""
    arguments = list(inspect.signature(root.forward).parameters.values())
    defaults = {a.name: a.default for a in arguments[1:] if a.default is not a.empty}
    try:
        graph = _Tracer().trace(root, concrete_args=defaults or None)
    except Exception as error:  # anything can happen when a network's code meets proxies
        raise UntraceableError(f"{type(error).__name__}: {error}") from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for extra in inputs[1:]:
        for user in reversed(_descendants(extra)):
            if not user.users and user.op != "output":
                graph.erase_node(user)
        if extra.users:
            raise UntraceableError("the network takes more than one tensor")
        graph.erase_node(extra)
    return graph


def _descendants(node: fx.Node) -> list[fx.Node]:
    """Return every node that depends on `node`, in order."""
    reached = {node}
    for later in node.graph.nodes:
        if reached.intersection(later.all_input_nodes):
            reached.add(later)
    return [later for later in node.graph.nodes if later in reached and later is not node]


def _remove_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite every in-place operation to return a new tensor, and let later readers of the changed one read that."""
    for node in list(graph.nodes):
        if _make_out_of_place(node, root):
            changed = node.all_input_nodes[0]
            later = False
            for reader in list(graph.nodes):
                if later and changed in reader.all_input_nodes:
                    reader.replace_input_with(changed, node)
                later = later or reader is node
    switch_off_in_place(root)


def _make_out_of_place(node: fx.Node, root: nn.Module) -> bool:
    """Rewrite `node` if it changes its first input; return whether it did."""
    if node.kwargs.get("out") is not None or node.target is operator.setitem:
        raise UntraceableError(f"{node.format_node()} writes into a tensor")
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    if node.op == "call_method" and _ends_in_place(str(node.target)):
        node.target = _stripped(str(node.target), (Tensor,)).__name__
        return True
    if node.op != "call_function" or not callable(node.target):
        return False
    if node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
        return isinstance(node.args[0], fx.Node)
    name = getattr(node.target, "__name__", "")
    if _ends_in_place(name):
        node.target = _stripped(name, (torch, F))
        return True
    return _clear_inplace_argument(node)


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and (hasattr(Tensor, name) or hasattr(F, name))


def _stripped(name: str, places: tuple[Any, ...]) -> Any:
    """Return the out-of-place function for the in-place `name`: relu for relu_."""
    for place in places:
        if hasattr(place, name[:-1]):
            return getattr(place, name[:-1])
    raise UntraceableError(f"{name} writes into a tensor and has no form that does not")


def _clear_inplace_argument(node: fx.Node) -> bool:
    """Set the argument `inplace` of a function call to False; return whether it was True."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # builtins have no signature, and no such argument
        return False
    if bound.arguments.get("inplace") is not True:
        return False
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return True


def _settle(graph: fx.Graph) -> None:
    """Move reads of parameters before their first reader, and operations nobody needs behind their last input."""
    nodes: list[fx.Node] = list(graph.nodes)
    needed = {nodes[-1]}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in nodes:
        if node.op in {"placeholder", "output", "get_attr"} or node in needed:
            continue
        order = {other: place for place, other in enumerate(graph.nodes)}
        inputs = [other for other in node.all_input_nodes if other.op != "get_attr"]
        if inputs:
            max(inputs, key=order.__getitem__).append(node)
    order = {other: place for place, other in enumerate(graph.nodes)}
    for node in nodes:
        if node.op == "get_attr" and node.users:
            min(node.users, key=order.__getitem__).prepend(node)
        elif node.op == "get_attr":
            graph.erase_node(node)
    graph.lint()


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the form of every tensor, and which values carry activations."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.forms: dict[fx.Node, Boundary] = {}
        self.activations: set[fx.Node] = set()  # tensors, or tuples of them, computed from the input's elements

    def run_node(self, n: fx.Node) -> Any:
        inputs = [(node, value) for node in n.all_input_nodes if isinstance(value := self.env[node], Tensor)]
        versions = [value._version for _, value in inputs]
        result = super().run_node(n)
        # Work in place that the rewriting did not know shows in the versions, which PyTorch raises with every change.
        if versions != [value._version for _, value in inputs]:
            raise UntraceableError(f"{n.format_node()} changes its input in place")
        if isinstance(result, Tensor):
            self.forms[n] = Boundary.of(result)
        carries = any(isinstance(part, Tensor) for part in tree_leaves(result))
        if carries and (n.op == "placeholder" or self.activations.intersection(n.all_input_nodes)):
            self.activations.add(n)
        return result


def _segments(graph: fx.Graph, root: nn.Module, values: _Recorder) -> Iterable[Segment]:
    """Yield the segments between neighbouring cut points."""
    nodes: list[fx.Node] = list(graph.nodes)
    alive = _alive_after(nodes)
    cuts = _cut_points(nodes, alive, _shared_places(nodes, root), values)
    for (start, source), (end, result) in pairwise(cuts):
        inside = nodes[start + 1 : end + 1]
        needed = {source, result}
        for node in reversed(inside):
            if node in needed:
                needed.update(node.all_input_nodes)
        body = tuple(node for node in inside if node in needed and node.op != "get_attr")
        flowing = needed & values.activations
        branches = any(len(alive[place] & flowing) > 1 for place in range(start + 1, end))
        yield Segment(tuple(inside), body, source, result, branches)


def _alive_after(nodes: list[fx.Node]) -> list[set[fx.Node]]:
    """Return, for every place in the order, the values made up to it that are needed behind it (parameters aside)."""
    place = {node: index for index, node in enumerate(nodes)}
    ends: dict[int, list[fx.Node]] = defaultdict(list)
    alive: set[fx.Node] = set()
    result = []
    for index, node in enumerate(nodes):
        alive.difference_update(ends[index])
        if node.users and node.op != "get_attr":
            alive.add(node)
            ends[max(place[user] for user in node.users)].append(node)
        result.append(set(alive))
    return result


def _shared_places(nodes: list[fx.Node], root: nn.Module) -> set[int]:
    """Return the places between the first and the last use of a parameter or buffer that is used more than once."""
    uses: dict[int, list[int]] = defaultdict(list)
    place = {node: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes):
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            for tensor in {*module.parameters(), *module.buffers()}:
                uses[id(tensor)].append(index)
        elif node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(root)
            uses[id(tensor)] += [place[user] for user in node.users]
    return {between for used in uses.values() for between in range(min(used), max(used))}


def _cut_points(
    nodes: list[fx.Node], alive: list[set[fx.Node]], forbidden: set[int], values: _Recorder
) -> list[tuple[int, fx.Node]]:
    """Return (place, value) of each cut point in order, from the network's input to its output."""
    last_place: dict[fx.Node, int] = {}
    for place in range(len(nodes) - 1):
        if len(alive[place]) == 1 and place not in forbidden:
            (value,) = alive[place]
            if value in values.forms and value in values.activations:
                last_place[value] = place
    cuts = []
    for value, place in last_place.items():
        while nodes[place].op == "get_attr":  # belongs to the operation behind it
            place -= 1  # noqa: PLW2901
        cuts.append((0 if value.op == "placeholder" else place, value))
    return cuts
