"""Which channels of blocks belong together: what is made, passed on and read as one, found in the blocks' graphs.

A unit of a group is what can be taken away alone: one channel, or all channels of a convolution's group, at every layer
that has it. What operations do with channels is the walk's to know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from distill.blocks.tracing import UntraceableError, trace
from distill.recipes.group import Group
from distill.recipes.spaces import Channels, Space
from distill.recipes.walk import EDGE, Use, Walk, inputs_of


def inner_groups(module: nn.Module, x: Tensor) -> tuple[list[Group], dict[str, str]]:
    """Return the groups inside a block in the order of use, and why the outputs of other layers, by path, must stay;
    what the block gives for `x` (two rows or more) is not spoken of. `module` must be in eval mode.

    Raises UntraceableError where the block has no graph.
    """
    found = follow([module], x)
    return found.groups, found.kept


def outer_layers(module: nn.Module, x: Tensor) -> list[str]:
    """Return the dense convolutions and linear layers, in the order of use, whose outputs are channels that the block
    has in common with others: those of what it gives for `x`. Conditions are those of inner_groups()."""
    return list(follow([module], x).outer)


@dataclass(frozen=True)
class Part:
    """Channels side by side at a boundary: `each` of them for every one of `units`, those of the group with this number
    or, where it is None, of none that could lose some."""

    group: int | None
    units: int
    each: int


@dataclass(frozen=True)
class Followed:
    """The groups of blocks in a row, in the order of use; why the outputs of other layers, by path, must stay; and for
    every boundary between two blocks the parts that its channels are, none where they could not be followed."""

    groups: list[Group]
    kept: dict[str, str]
    boundaries: list[tuple[Part, ...]]
    crossing: frozenset[str]  # the layers whose outputs, or some of them, reach a boundary
    outer: tuple[str, ...]  # those whose outputs the last block gives, in the order of use


def follow(modules: Sequence[nn.Module], x: Tensor) -> Followed:
    """Return what belongs together in blocks that run one after another, from the input `x` (two rows or more) of the
    first; what that gets and the last one gives is not spoken of. All are in eval mode.

    Raises UntraceableError where a block has no graph.
    """
    walk = Walk()
    for module in modules:
        x = walk.through(traced(module, x), x)
    walk.end()
    return _grouped(walk)


@torch.no_grad()
def traced(module: nn.Module, x: Tensor) -> fx.GraphModule:
    """Return a block as the graph of its operations. Raises UntraceableError where it has none."""
    if isinstance(module, fx.GraphModule):
        return module
    output = module(x)
    if not isinstance(output, Tensor):
        raise UntraceableError(f"it gives a {type(output).__name__}")
    traced = trace(module, x, output)
    return fx.GraphModule(traced.root, traced.segments[0].source.graph)


def _grouped(walk: Walk) -> Followed:
    uses = {role: [one for use in found for one in use.settled()] for role, found in walk.uses.items()}
    spaces = dict.fromkeys(use.run.space for use in uses["producers"])
    groups = {space: _group(walk, space, uses) for space in spaces if space.pinned is None}
    kept: dict[str, str] = {}
    for use in uses["producers"]:
        space = use.run.space
        if space.pinned is None and not groups[space].consumers:
            kept[use.site.path] = "no layer reads its channels"
        elif space.pinned not in {None, EDGE}:
            kept[use.site.path] = str(space.pinned)
    read = {space: group for space, group in groups.items() if group.consumers}
    numbers = {space: number for number, space in enumerate(read)}
    runs = [one.settled() if isinstance(one, Channels) else () for one in walk.between[1:-1]]
    boundaries = [tuple(Part(numbers.get(run.space), run.space.units, run.each) for run in one) for one in runs]
    crossing = {run.space for one in runs for run in one}
    paths = frozenset(use.site.path for use in uses["producers"] if use.run.space in crossing)
    outer = dict.fromkeys(use.site.path for use in uses["producers"] if use.run.space.pinned == EDGE)
    return Followed(list(read.values()), kept, boundaries, paths, tuple(outer))


def _group(walk: Walk, root: Space, uses: Mapping[str, Sequence[Use]]) -> Group:
    producers, passes, readers, zeros, heads = (
        [use for use in found if use.run.space is root] for found in uses.values()
    )
    ends = {use.node for use in producers}
    gates = [use for use in readers if _reads_one_row(walk, use.node) and not ends.isdisjoint(_behind(use.node))]
    consumers = [use for use in readers if use not in gates]
    return Group(
        root.units,
        root.units,
        *(tuple(use.site for use in found) for found in (producers, passes, consumers, gates, zeros, heads)),
    )


def _reads_one_row(walk: Walk, reader: fx.Node) -> bool:
    """Whether a layer gets one value a channel and image."""
    (source,) = inputs_of(reader)
    if source not in walk.channels:  # it reads what is inside it
        return False
    shape = walk.shapes[source]
    return math.prod(shape) == shape[0] * shape[walk.channels[source].dim]


def _behind(node: fx.Node) -> set[fx.Node]:
    """Return all that depends on `node`."""
    found: set[fx.Node] = set()
    waiting = list(node.users)
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.users
    return found
