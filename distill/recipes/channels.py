"""Which channels of blocks belong together: what is made, passed on and read as one, found in the blocks' graphs.

A unit of a group is what can be taken away alone: one channel, or all channels of a convolution's group, at every layer
that has it. Knows layers and operations, but no networks. What it does not know keeps the channels that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from distill.blocks.tracing import UntraceableError, trace
from distill.recipes.group import Group, Site
from distill.recipes.odd_layers import odd_layers
from distill.recipes.spaces import Channels, MismatchError, Run, Space
from distill.recipes.zeros import is_padding, padder

POINTWISE_LAYERS = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
SPATIAL_LAYERS = (
    nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d,
    nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.Upsample,
)  # fmt: skip
PER_CHANNEL_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.PReLU)

# Functions and methods of tensors, by the name that both have; operators are functions too.
POINTWISE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "sigmoid", "tanh", "softplus", "softsign", "clamp", "abs", "neg", "square", "sqrt", "exp", "dropout",
    "stochastic_depth", "contiguous", "clone", "float", "add", "sub", "mul", "div", "truediv",
}  # fmt: skip
PADDED = "its code adds channels of zeros, so many whatever the width"
SPATIAL = {"avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"}
CONCATENATING = {"cat", "concat", "concatenate"}

EDGE = "its channels are the block's own"  # no news: everything else is told to the user
IMAGES_DIM = 4  # (batch, channels, height, width)


def inner_groups(module: nn.Module, x: Tensor) -> tuple[list[Group], dict[str, str]]:
    """Return the groups inside a block in the order of use, and why the outputs of other layers, by path, must stay;
    what the block gives for `x` (two rows or more) is not spoken of. `module` must be in eval mode.

    Raises UntraceableError where the block has no graph.
    """
    found = follow([module], x)
    return found.groups, found.kept


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


def follow(modules: Sequence[nn.Module], x: Tensor) -> Followed:
    """Return what belongs together in blocks that run one after another, from the input `x` (two rows or more) of the
    first; what that gets and the last one gives is not spoken of. All are in eval mode.

    Raises UntraceableError where a block has no graph.
    """
    analysis = _Analysis()
    for module in modules:
        x = analysis.walk(module if isinstance(module, fx.GraphModule) else _traced(module, x), x)
    return analysis.ended()


@torch.no_grad()
def _traced(module: nn.Module, x: Tensor) -> fx.GraphModule:
    output = module(x)
    if not isinstance(output, Tensor):
        raise UntraceableError(f"it gives a {type(output).__name__}")
    traced = trace(module, x, output)
    return fx.GraphModule(traced.root, traced.segments[0].source.graph)


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor, and of what else tensors come out."""

    def __init__(self, module: fx.GraphModule, found: dict[fx.Node, tuple[int, ...]], several: set[fx.Node]) -> None:
        super().__init__(module)
        self._found, self._several = found, several

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self._found[n] = tuple(result.shape)
        elif any(isinstance(part, Tensor) for part in tree_leaves(result)):
            self._several.add(n)
        return result


@dataclass(frozen=True)
class _Use:
    """Where a layer has channels of a run, from number `start` on."""

    node: fx.Node
    start: int
    run: Run
    path: str

    @property
    def site(self) -> Site:
        return Site(self.path, self.start, self.run.each)

    def settled(self) -> Iterator[_Use]:
        start = self.start
        for run in self.run.settled():
            yield replace(self, start=start, run=run)
            start += 0 if is_padding(self.node) else run.width  # of zeros one is as good as another


class _Analysis:
    """A walk through graphs in a row. Tensors whose channels are not spoken of, the first one's input among them, have
    a reason."""

    def __init__(self) -> None:
        self._module = fx.GraphModule(nn.Module(), fx.Graph())
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._several: set[fx.Node] = set()
        self._channels: dict[fx.Node, Channels] = {}
        self._stays: dict[fx.Node, str] = {}
        self._uses: dict[str, list[_Use]] = {role: [] for role in ("producers", "passes", "readers", "zeros")}
        self._odd: dict[str, str] = {}
        self._between: list[Channels | str] = [EDGE]  # what passes between graphs, or why that is not spoken of

    @torch.no_grad()
    def walk(self, module: fx.GraphModule, x: Tensor) -> Tensor:
        """Go through the next graph; return what it gives for `x`."""
        self._module = module
        self._odd |= odd_layers(module)
        result: Tensor = _Shapes(module, self._shapes, self._several).run(x)
        for node in module.graph.nodes:
            self._visit(node)
        return result

    def ended(self) -> Followed:
        """Return what was found, when the last graph has been gone through."""
        if isinstance(self._between[-1], Channels):
            self._between[-1].pin(EDGE, always=True)
        uses = {role: [one for use in found for one in use.settled()] for role, found in self._uses.items()}
        spaces = dict.fromkeys(use.run.space for use in uses["producers"])
        groups = {space: self._group(space, uses) for space in spaces if space.pinned is None}
        kept: dict[str, str] = {}
        for use in uses["producers"]:
            space = use.run.space
            if space.pinned is None and not groups[space].consumers:
                kept[use.site.path] = "no layer reads its channels"
            elif space.pinned not in {None, EDGE}:
                kept[use.site.path] = str(space.pinned)
        read = {space: group for space, group in groups.items() if group.consumers}
        numbers = {space: number for number, space in enumerate(read)}
        runs = [one.settled() if isinstance(one, Channels) else () for one in self._between[1:-1]]
        boundaries = [tuple(Part(numbers.get(run.space), run.space.units, run.each) for run in one) for one in runs]
        crossing = {run.space for one in runs for run in one}
        paths = frozenset(use.site.path for use in uses["producers"] if use.run.space in crossing)
        return Followed(list(read.values()), kept, boundaries, paths)

    def _visit(self, node: fx.Node) -> None:
        """Write down what an operation makes of channels, or why they stay."""
        try:
            channels = self._of(node)
        except MismatchError as mismatch:
            self._pin(node, str(mismatch))
            self._stays[node] = str(mismatch)
            return
        if channels is None:
            reasons = [self._stays[source] for source in _inputs(node) if source in self._stays]
            self._stays.setdefault(node, reasons[0] if reasons else EDGE)
        else:
            self._channels[node] = channels

    def _group(self, root: Space, uses: Mapping[str, Sequence[_Use]]) -> Group:
        producers, passes, readers, zeros = ([use for use in found if use.run.space is root] for found in uses.values())
        ends = {use.node for use in producers}
        gates = [use for use in readers if self._reads_one_row(use.node) and not ends.isdisjoint(_behind(use.node))]
        consumers = [use for use in readers if use not in gates]
        return Group(
            root.units,
            root.units,
            *(tuple(use.site for use in found) for found in (producers, passes, consumers, gates, zeros)),
        )

    def _reads_one_row(self, reader: fx.Node) -> bool:
        """Whether a layer gets one value a channel and image."""
        (source,) = _inputs(reader)
        shape = self._shapes[source]
        return math.prod(shape) == shape[0] * shape[self._channels[source].dim]

    def _pin(self, node: fx.Node, reason: str) -> None:
        """Keep all channels that reach an operation; that they are the block's own goes before other reasons."""
        for source in _inputs(node):
            if source in self._channels:
                self._channels[source].pin(reason, always=reason == EDGE)

    # What an operation makes of the channels that it gets; None where there are none to speak of.

    def _of(self, node: fx.Node) -> Channels | None:
        if node.op == "placeholder":
            return self._entered(node)
        if node.op == "get_attr":
            self._stays[node] = "it is combined with a weight of no layer"
            return None
        if node.op == "output":
            return self._left(_inputs(node)[0])
        if node.op == "call_module":
            return self._layer(node, self._module.get_submodule(str(node.target)))
        if not any(source in self._channels for source in _inputs(node)):
            return None
        if node in self._several:
            raise MismatchError(f"its channels meet in {_name(node)}()")
        # A size is the same number whatever it is read from: what is made of it counts.
        return self._function(node) if node in self._shapes else None

    def _entered(self, node: fx.Node) -> Channels | None:
        given = self._between[-1]
        if isinstance(given, Channels):
            return given
        self._stays[node] = given
        return None

    def _left(self, given: fx.Node) -> None:
        channels = self._channels.get(given)
        if channels is not None and channels.dim != 1:
            channels.pin("between blocks its channels are not where those of images are")
        self._between.append(self._stays[given] if channels is None else channels)

    def _layer(self, node: fx.Node, layer: nn.Module) -> Channels | None:
        known = [self._channels[source] for source in _inputs(node) if source in self._channels]
        given = known[0] if known else None
        if known and len(_inputs(node)) > 1:
            raise MismatchError(f"its channels meet others in a {type(layer).__name__}")
        if isinstance(layer, nn.Conv2d | nn.Linear):
            grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
            return self._grouped(node, layer, given) if grouped else self._dense(node, layer, given)
        if given is None or isinstance(layer, POINTWISE_LAYERS) or _is_one_slope(layer):
            return given
        if isinstance(layer, PER_CHANNEL_LAYERS):
            self._refuse(node, given, dim=1)
            self._use("passes", node, given)
            return given
        if isinstance(layer, nn.Flatten):
            return self._flattened(node, given, layer.start_dim, layer.end_dim)
        if isinstance(layer, SPATIAL_LAYERS):
            return self._spatial(node, given)
        raise MismatchError(f"its channels meet in a {type(layer).__name__}")

    def _dense(self, node: fx.Node, layer: nn.Module, given: Channels | None) -> Channels:
        dim = 1 if isinstance(layer, nn.Conv2d) else len(self._shapes[node]) - 1
        made = Channels(dim, (Run(Space(self._shapes[node][dim]), 1),))
        try:
            self._refuse(node, given, dim)
            if given is not None:
                self._use("readers", node, given)
        except MismatchError as mismatch:
            self._pin(node, str(mismatch))
            if node.target in self._odd:
                made.pin(str(mismatch))
        self._use("producers", node, made)
        return made

    def _grouped(self, node: fx.Node, layer: nn.Module, given: Channels | None) -> Channels | None:
        """A convolution in groups, depthwise or not: its outputs go with the inputs of their group."""
        if given is None:
            return None
        self._refuse(node, given, dim=1)
        if len(given.settled()) > 1:
            raise MismatchError("a convolution in groups reads it beside others")
        units = int(layer.groups)  # type: ignore[arg-type]
        space = given.settled()[0].divided(units)
        made = Channels(1, (Run(space, self._shapes[node][1] // units),))
        self._use("passes", node, made)
        return made

    def _function(self, node: fx.Node) -> Channels:
        name = _name(node)
        if name in POINTWISE:
            return self._pointwise(node)
        if name in CONCATENATING:
            return self._concatenated(node)
        given = self._channels.get(_inputs(node)[0])
        if given is None or len(_inputs(node)) > 1:
            raise MismatchError(f"its channels meet in {name}()")
        if name in SPATIAL or (name == "getitem" and _leaves_out_no_dim(node, given.dim)):
            return self._spatial(node, given)
        if name == "pad":
            return self._padded(node, given)
        return self._rearranged(node, name, given)

    def _rearranged(self, node: fx.Node, name: str, given: Channels) -> Channels:
        rank, numbers = len(self._shapes[_inputs(node)[0]]), _numbers(node)
        dims = [dim % rank for dim in numbers]
        if name == "mean":
            return self._averaged(node, given, set(dims))
        if name == "flatten":
            return self._flattened(node, given, *(numbers or [0]))
        if name == "permute":
            return Channels(dims.index(given.dim), given.runs)
        if name == "transpose":
            one, other = dims
            return Channels({one: other, other: one}.get(given.dim, given.dim), given.runs)
        raise MismatchError(f"its channels meet in {name}()")

    def _pointwise(self, node: fx.Node) -> Channels:
        """An operation between the elements at one place of its inputs, of which some may have one for many."""
        sources = [source for source in _inputs(node) if source in self._shapes]
        places = {len(self._shapes[x]) - self._channels[x].dim for x in sources if x in self._channels}
        if len(places) > 1:
            raise MismatchError("it is combined with something else than channels")
        (place,) = places  # counted from the last dimension, as broadcasting does
        wide = [x for x in sources if len(self._shapes[x]) >= place and self._shapes[x][-place] > 1]
        known = [self._channels[x] for x in wide if x in self._channels]
        if not known:
            raise MismatchError("it is combined with more channels than it has")
        for other in known[1:]:
            known[0].join(other)
        for stays in [self._stays[x] for x in wide if x not in self._channels]:
            self._pin(node, stays)
        return Channels(len(self._shapes[node]) - place, known[0].runs)

    def _concatenated(self, node: fx.Node) -> Channels:
        dim = next(iter(_numbers(node)), 0) % len(self._shapes[node])
        runs: list[Run] = []
        for source in node.args[0] if node.args else node.kwargs["tensors"]:  # type: ignore[union-attr]
            assert isinstance(source, fx.Node)
            given = self._channels.get(source)
            if given is None:
                given = Channels(dim, (Run(Space(self._shapes[source][dim]), 1),))
                given.pin(self._stays[source])
            if given.dim != dim:
                raise MismatchError("it is concatenated along something else than channels")
            runs += given.runs
        return Channels(dim, tuple(runs))

    def _padded(self, node: fx.Node, given: Channels) -> Channels:
        """Zeros around it; among its channels as few as there may be, where a module of its own adds them."""
        place = 2 * (len(self._shapes[node]) - given.dim - 1)
        before, after = (*_numbers(node), *[0] * (place + 2))[place : place + 2]
        if node.kwargs.get("mode", (*node.args, *["constant"] * 3)[2]) != "constant" or min(before, after) < 0:
            raise MismatchError("its channels meet in pad()")
        path = padder(self._module, node) if before + after else None
        around: list[tuple[Run, ...]] = []
        for side, zeros in enumerate((before, after)):
            added = (Run(Space(zeros), 1),) if zeros else ()
            if path is None:
                Channels(given.dim, added).pin(PADDED)
            else:
                self._uses["zeros"] += [_Use(node, place + side, run, path) for run in added]
            around.append(added)
        return Channels(given.dim, (*around[0], *given.runs, *around[1]))

    def _spatial(self, node: fx.Node, given: Channels) -> Channels:
        if given.dim != 1 or len(self._shapes[node]) != IMAGES_DIM:
            raise MismatchError("its channels are not where those of images are")
        return given

    def _averaged(self, node: fx.Node, given: Channels, dims: set[int]) -> Channels:
        if not dims or given.dim in dims:
            raise MismatchError("its channels meet in mean()")
        dropped = len(self._shapes[node]) < len(self._shapes[_inputs(node)[0]])
        return Channels(given.dim - (sum(dim < given.dim for dim in dims) if dropped else 0), given.runs)

    def _flattened(self, node: fx.Node, given: Channels, start: int, end: int = -1) -> Channels:
        shape = self._shapes[_inputs(node)[0]]
        start, end = start % len(shape), end % len(shape)
        if given.dim > start:
            raise MismatchError("its channels meet in flatten()")
        times = math.prod(shape[start + 1 : end + 1]) if given.dim == start else 1
        return Channels(given.dim, tuple(Run(run.space, run.each * times) for run in given.runs))

    def _use(self, role: str, node: fx.Node, channels: Channels) -> None:
        start = 0
        for run in channels.runs:
            self._uses[role].append(_Use(node, start, run, str(node.target)))
            start += run.width

    def _refuse(self, node: fx.Node, given: Channels | None, dim: int) -> None:
        """Raise where a layer is none of which channels can be taken away."""
        if node.target in self._odd:
            raise MismatchError(self._odd[str(node.target)])
        if given is not None and given.dim != dim:
            raise MismatchError("a layer reads something else of it than channels")


def _is_one_slope(layer: nn.Module) -> bool:
    return isinstance(layer, nn.PReLU) and layer.num_parameters == 1


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def _inputs(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def _numbers(node: fx.Node) -> list[int]:
    """Return the whole numbers among an operation's arguments, those in tuples too."""
    leaves = tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, int) and not isinstance(leaf, bool)]


def _leaves_out_no_dim(node: fx.Node, channels: int) -> bool:
    """Whether an index keeps all dimensions of a tensor, and all of its channels."""
    index = node.args[1]
    places = index if isinstance(index, tuple) else (index,)
    sliced = all(isinstance(place, slice) for place in places)
    return sliced and (len(places) <= channels or places[channels] == slice(None))


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
