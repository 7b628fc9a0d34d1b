"""Heads of attention, and fewer of them: where a network's code divides channels into heads, and code of its own for
nn.MultiheadAttention, which has as many heads as make its width.

A head is a unit of channels: so many queries, keys and values that linear layers make, and as many inputs of the layer
that reads what the heads give.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from distill.blocks.tracing import module_stack, symbolic_graph

HEADS_DIM = 1  # (batch, heads, positions, channels of a head)
ALIKE = {"contiguous", "clone", "mul"}  # what leaves every number at its place
FORMS = {"size", "getattr"}  # what reads a tensor's form alone
PROJECTIONS = ("in_proj", "out_proj")  # the layers of an nn.MultiheadAttention


class SelfAttention(nn.Module):
    """What an nn.MultiheadAttention makes of one sequence, in layers that can be looked at and made narrower."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        assert attention.in_proj_weight is not None
        self.heads, self.dropout = attention.num_heads, attention.dropout
        self.batch_first = attention.batch_first
        width = attention.embed_dim
        self.in_proj = nn.Linear(width, 3 * width, bias=attention.in_proj_bias is not None, device="meta")
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(width, width, bias=attention.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """Return what it gives for a sequence of which nobody asks for the weights."""
        x = query if self.batch_first else query.transpose(0, 1)
        batch, positions, _ = x.shape
        parts = self.in_proj(x).reshape(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        queries, keys, values = parts
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        given = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (given if self.batch_first else given.transpose(0, 1)), None


def opened(block: nn.Module, paths: Collection[str]) -> nn.Module:
    """Return a block with the nn.MultiheadAttention at these paths as layers; itself, where there are none."""
    if not paths:
        return block
    block = copy.deepcopy(block)
    open_attention(block, paths)
    return block


def open_attention(network: nn.Module, paths: Iterable[str]) -> None:
    """Let the nn.MultiheadAttention at these paths be layers, with the weights that it has."""
    for path in paths:
        attention = network.get_submodule(path)
        if isinstance(attention, nn.MultiheadAttention):
            network.set_submodule(path, SelfAttention(attention).train(attention.training))


@contextmanager
def seen_heads(network: nn.Module) -> Iterator[None]:
    """While it lasts, every nn.MultiheadAttention that can runs its output projection as a layer, which hooks see."""
    found = [one for one in network.modules() if isinstance(one, nn.MultiheadAttention) and why_closed(one) is None]
    try:
        for attention in found:
            given = attention.forward

            def forward(
                *inputs: Tensor, attention: nn.MultiheadAttention = attention, given: Any = given, **options: Any
            ) -> Any:
                if not _is_of_one(inputs, options):
                    return given(*inputs, **options)
                opened = SelfAttention(attention)
                opened.out_proj = attention.out_proj
                return opened.eval()(*inputs)

            attention.forward = forward  # type: ignore[method-assign, assignment]
        yield
    finally:
        for attention in found:
            del attention.forward


def closed_attention(module: fx.GraphModule) -> dict[str, str | None]:
    """Return why the heads of every nn.MultiheadAttention in a graph cannot be taken apart, by path; None where they
    can."""
    found: dict[str, str | None] = {}
    for node in module.graph.nodes:
        attention = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(attention, nn.MultiheadAttention):
            path, reason = str(node.target), why_closed(attention)
            if not _is_of_one(node.args, node.kwargs):
                reason = reason or "it is asked for its weights, or given masks, or several tensors"
            found[path] = "it is used more than once" if path in found else reason
    return found


def why_closed(attention: nn.MultiheadAttention) -> str | None:
    """Return why an nn.MultiheadAttention is not of the usual form; None where it is."""
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"a {type(attention).__name__} may do something else than its base class"
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return "its keys and values are of other widths, or more than those of the sequence"
    return None


def _is_of_one(inputs: Any, options: Mapping[str, Any]) -> bool:
    """Whether these are the arguments of a call for one sequence, without masks."""
    plain = all(value is None or value is False for value in options.values())
    return plain and len(inputs) == 3 and options.get("need_weights") is False and all(x is inputs[0] for x in inputs)


@dataclass(frozen=True)
class Core:
    """Attention of heads in a graph. `sources` are the layers' operations that queries, keys and values come from,
    equal parts of what these give where they are the same; `merge` joins the channels of all heads. `numbers` are the
    places among operations' arguments of how many heads there are, or channels of all."""

    attend: fx.Node
    sources: tuple[fx.Node, ...]
    merge: fx.Node
    numbers: tuple[tuple[fx.Node, int], ...]
    inside: frozenset[fx.Node]

    @property
    def path(self) -> str:
        """The module whose code it is; none where the graph is that module's own."""
        return next((path for _, path, _ in module_stack(self.attend)[-1:]), "")


def cores(graph: fx.Graph) -> list[Core]:
    """Return the attention of heads in a graph, as far as it is of a known form, and one in a module."""
    found = [
        core for node in graph.nodes if operation(node) == "scaled_dot_product_attention" and (core := _core(node))
    ]
    paths = [core.path for core in found]
    return [core for core in found if paths.count(core.path) == 1]


def _core(attend: fx.Node) -> Core | None:
    ways = [_back(node) for node in attend.args[:3] if isinstance(node, fx.Node)]
    merged = _ahead(attend)
    if len(attend.all_input_nodes) != 3 or None in ways or merged is None:
        return None
    merge, passed = merged
    sources = tuple(way.source for way in ways if way is not None)
    numbers = {way.split for way in ways if way is not None}
    inside = {attend, *passed}.union(*(way.inside for way in ways if way is not None))
    if operation(merge) != "flatten":
        numbers.add((merge, len(_sizes(merge)) - 1))
    return Core(attend, sources, merge, tuple(numbers), frozenset(inside - {merge}))


@dataclass
class _Way:
    """From queries, keys or values to the layer that makes them."""

    source: fx.Node
    split: tuple[fx.Node, int]
    inside: list[fx.Node]


def _back(node: fx.Node) -> _Way | None:
    dim, inside = HEADS_DIM, []
    while len(node.all_input_nodes) >= 1:
        (given, *sizes), name = node.all_input_nodes, operation(node)
        inside.append(node)
        if name in {"reshape", "view"}:
            return _Way(given, (node, dim), inside) if given.op == "call_module" else None
        if sizes:
            return None
        if name == "permute":
            dim = _sizes(node)[dim]
        elif name == "transpose":
            dim = _swapped(node, dim)
        elif name == "unbind":
            dim += dim >= next(iter(_sizes(node)), 0)
        elif name == "getitem" and isinstance(node.args[1], int):
            dim += operation(given) != "unbind"
        elif name not in ALIKE and node.op != "call_module":
            return None
        node = given
    return None


def _ahead(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """Return what joins the channels of all heads, and what lies before."""
    passed: list[fx.Node] = []
    while len(users := [user for user in node.users if operation(user) not in FORMS]) == 1:
        (node,) = users
        if operation(node) in {"reshape", "view", "flatten"}:
            return node, passed
        if operation(node) not in {"transpose", "permute", *ALIKE}:
            return None
        passed.append(node)
    return None


def _sizes(node: fx.Node) -> list[Any]:
    """Return the arguments of an operation but the tensor, given one by one or together."""
    rest = node.args[1:]
    return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else list(rest)


def _swapped(node: fx.Node, dim: int) -> int:
    one, other = (int(place) % 4 for place in _sizes(node))
    return {one: other, other: one}.get(dim, dim)


def operation(node: fx.Node) -> str:
    """Return the name of the function or method that an operation is; none for a layer."""
    if node.op == "call_module":
        return ""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def remove_heads(network: nn.Module, path: str, heads: int, size: int) -> None:
    """Leave so many heads, of `size` channels each, in the attention that the module at `path` is, or whose operations
    a traced block has. Its layers are left alone."""
    if isinstance(network, fx.GraphModule):
        for core in cores(network.graph):
            if core.path == path:
                _leave(network, core, heads, size)
                return
    module = network.get_submodule(path)
    if isinstance(module, SelfAttention):
        module.heads = heads
        return
    own = _traced(module)
    (core,) = cores(own.graph)
    _leave(own, core, heads, size)
    network.set_submodule(path, own)


def _leave(module: fx.GraphModule, core: Core, heads: int, size: int) -> None:
    for node, place in core.numbers:
        _set(node, place, heads * size if node is core.merge else heads)
    module.recompile()


def _set(node: fx.Node, place: int, number: int) -> None:
    sizes = _sizes(node)
    if sizes[place] == -1:
        return
    sizes[place] = number
    together = len(node.args) == 2 and isinstance(node.args[1], tuple | list)
    node.args = (node.args[0], tuple(sizes)) if together else (node.args[0], *sizes)


def _traced(module: nn.Module) -> fx.GraphModule:
    """Return a module as the operations that its code comes to in use, with its layers; what else than the first
    argument it may be given is ignored, as where blocks are cut."""
    training = module.training
    graph = symbolic_graph(module.eval())
    module.train(training)
    first = next(iter(graph.nodes))
    with graph.inserting_after(first):
        for argument in reversed(list(inspect.signature(module.forward).parameters.values())[1:]):
            graph.placeholder(argument.name, default_value=argument.default)
    return fx.GraphModule(module, graph).train(training)
