"""What operations make of the channels that they get, in blocks that run one after another.

Knows layers and operations, but no networks. What it does not know keeps the channels that reach it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from distill.recipes.group import Site
from distill.recipes.heads import PROJECTIONS, Core, SelfAttention, cores, operation
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
class Use:
    """Where a layer has channels of a run, from number `start` on."""

    node: fx.Node
    start: int
    run: Run
    path: str

    @property
    def site(self) -> Site:
        return Site(self.path, self.start, self.run.each)

    def settled(self) -> Iterator[Use]:
        start = self.start
        for run in self.run.settled():
            yield replace(self, start=start, run=run)
            start += 0 if is_padding(self.node) else run.width  # of zeros one is as good as another


class Walk:
    """A walk through graphs in a row. Tensors whose channels are not spoken of, the first one's input among them, have
    a reason."""

    def __init__(self) -> None:
        self._module = fx.GraphModule(nn.Module(), fx.Graph())
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._several: set[fx.Node] = set()
        self.channels: dict[fx.Node, Channels] = {}
        self._stays: dict[fx.Node, str] = {}
        self.uses: dict[str, list[Use]] = {role: [] for role in ("producers", "passes", "readers", "zeros", "heads")}
        self._odd: dict[str, str] = {}
        self._merging: dict[fx.Node, Core] = {}
        self._inside: set[fx.Node] = set()
        self.between: list[Channels | str] = [EDGE]  # what passes between graphs, or why that is not spoken of

    @torch.no_grad()
    def through(self, module: fx.GraphModule, x: Tensor) -> Tensor:
        """Go through the next graph; return what it gives for `x`."""
        self._module = module
        self._odd |= odd_layers(module)
        found = cores(module.graph)
        self._merging = {core.merge: core for core in found}
        self._inside = set[fx.Node]().union(*(core.inside for core in found))
        result: Tensor = _Shapes(module, self.shapes, self._several).run(x)
        for node in module.graph.nodes:
            self._visit(node)
        return result

    def end(self) -> None:
        """Keep what the last graph gives."""
        if isinstance(self.between[-1], Channels):
            self.between[-1].pin(EDGE, always=True)

    def _visit(self, node: fx.Node) -> None:
        """Write down what an operation makes of channels, or why they stay."""
        if node in self._inside:
            return
        try:
            channels = self._of_heads(self._merging[node]) if node in self._merging else self._of(node)
        except MismatchError as mismatch:
            self._pin(node, str(mismatch))
            self._stays[node] = str(mismatch)
            return
        if channels is None:
            reasons = [self._stays[source] for source in inputs_of(node) if source in self._stays]
            self._stays.setdefault(node, reasons[0] if reasons else EDGE)
        else:
            self.channels[node] = channels

    def _pin(self, node: fx.Node, reason: str) -> None:
        """Keep all channels that reach an operation; that they are the block's own goes before other reasons."""
        for source in inputs_of(node):
            if source in self.channels:
                self.channels[source].pin(reason, always=reason == EDGE)

    # What an operation makes of the channels that it gets; None where there are none to speak of.

    def _of(self, node: fx.Node) -> Channels | None:
        if node.op == "placeholder":
            return self._entered(node)
        if node.op == "get_attr":
            self._stays[node] = "it is combined with a weight of no layer"
            return None
        if node.op == "output":
            self._left(inputs_of(node)[0])
            return None
        if node.op == "call_module":
            return self._layer(node, self._module.get_submodule(str(node.target)))
        if not any(source in self.channels for source in inputs_of(node)):
            return None
        if node in self._several:
            raise MismatchError(f"its channels meet in {operation(node)}()")
        # A size is the same number whatever it is read from: what is made of it counts.
        return self._function(node) if node in self.shapes else None

    def _entered(self, node: fx.Node) -> Channels | None:
        given = self.between[-1]
        if isinstance(given, Channels):
            return given
        self._stays[node] = given
        return None

    def _left(self, given: fx.Node) -> None:
        channels = self.channels.get(given)
        if channels is not None and channels.dim != 1:
            channels.pin("between blocks its channels are not where those of images are")
        self.between.append(self._stays[given] if channels is None else channels)

    def _layer(self, node: fx.Node, layer: nn.Module) -> Channels | None:
        known = [self.channels[source] for source in inputs_of(node) if source in self.channels]
        given = known[0] if known else None
        if known and len(inputs_of(node)) > 1:
            raise MismatchError(f"its channels meet others in a {type(layer).__name__}")
        if isinstance(layer, SelfAttention):
            self._opened(node, layer, given)
            return None
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

    def _of_heads(self, core: Core) -> Channels:
        """Every head is a unit: of queries, keys and values, which layers make, and of what it gives."""
        shapes = {self.shapes[given] for given in core.attend.all_input_nodes}
        *_, heads, _, size = shapes.pop()
        given = (Run(Space(heads), size),)
        for node, parts in Counter(core.sources).items():
            made = self.channels.get(node) or Channels(0, ())
            if shapes or sum(run.width for run in made.runs) != parts * heads * size:
                made.pin("its heads are not of one kind")
                raise MismatchError("its heads are not of one kind")
            made.join(Channels(made.dim, given * parts))
        self.uses["heads"].append(Use(core.merge, 0, given[0], core.path))
        return Channels(len(self.shapes[core.merge]) - 1, given)

    def _opened(self, node: fx.Node, attention: SelfAttention, given: Channels | None) -> None:
        """The same where the layers are inside."""
        if given is not None:
            given.pin("its channels meet in attention")
        width = attention.out_proj.in_features
        run = Run(Space(attention.heads), width // attention.heads)
        for start in (0, width, 2 * width):
            self.uses["producers"].append(Use(node, start, run, f"{node.target}.{PROJECTIONS[0]}"))
        self.uses["readers"].append(Use(node, 0, run, f"{node.target}.{PROJECTIONS[1]}"))
        self.uses["heads"].append(Use(node, 0, run, str(node.target)))

    def _dense(self, node: fx.Node, layer: nn.Module, given: Channels | None) -> Channels:
        dim = 1 if isinstance(layer, nn.Conv2d) else len(self.shapes[node]) - 1
        made = Channels(dim, (Run(Space(self.shapes[node][dim]), 1),))
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
        made = Channels(1, (Run(space, self.shapes[node][1] // units),))
        self._use("passes", node, made)
        return made

    def _function(self, node: fx.Node) -> Channels:
        name = operation(node)
        if name in POINTWISE:
            return self._pointwise(node)
        if name in CONCATENATING:
            return self._concatenated(node)
        given = self.channels.get(inputs_of(node)[0])
        if given is None or len(inputs_of(node)) > 1:
            raise MismatchError(f"its channels meet in {name}()")
        if name in SPATIAL or (name == "getitem" and _leaves_out_no_dim(node, given.dim)):
            return self._spatial(node, given)
        if name == "pad":
            return self._padded(node, given)
        return self._rearranged(node, name, given)

    def _rearranged(self, node: fx.Node, name: str, given: Channels) -> Channels:
        rank, numbers = len(self.shapes[inputs_of(node)[0]]), _numbers(node)
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
        sources = [source for source in inputs_of(node) if source in self.shapes]
        places = {len(self.shapes[x]) - self.channels[x].dim for x in sources if x in self.channels}
        if len(places) > 1:
            raise MismatchError("it is combined with something else than channels")
        (place,) = places  # counted from the last dimension, as broadcasting does
        wide = [x for x in sources if len(self.shapes[x]) >= place and self.shapes[x][-place] > 1]
        known = [self.channels[x] for x in wide if x in self.channels]
        if not known:
            raise MismatchError("it is combined with more channels than it has")
        for other in known[1:]:
            known[0].join(other)
        for stays in [self._stays[x] for x in wide if x not in self.channels]:
            self._pin(node, stays)
        return Channels(len(self.shapes[node]) - place, known[0].runs)

    def _concatenated(self, node: fx.Node) -> Channels:
        dim = next(iter(_numbers(node)), 0) % len(self.shapes[node])
        runs: list[Run] = []
        for source in node.args[0] if node.args else node.kwargs["tensors"]:  # type: ignore[union-attr]
            assert isinstance(source, fx.Node)
            given = self.channels.get(source)
            if given is None:
                given = Channels(dim, (Run(Space(self.shapes[source][dim]), 1),))
                given.pin(self._stays[source])
            if given.dim != dim:
                raise MismatchError("it is concatenated along something else than channels")
            runs += given.runs
        return Channels(dim, tuple(runs))

    def _padded(self, node: fx.Node, given: Channels) -> Channels:
        """Zeros around it; among its channels as few as there may be, where a module of its own adds them."""
        place = 2 * (len(self.shapes[node]) - given.dim - 1)
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
                self.uses["zeros"] += [Use(node, place + side, run, path) for run in added]
            around.append(added)
        return Channels(given.dim, (*around[0], *given.runs, *around[1]))

    def _spatial(self, node: fx.Node, given: Channels) -> Channels:
        if given.dim != 1 or len(self.shapes[node]) != IMAGES_DIM:
            raise MismatchError("its channels are not where those of images are")
        return given

    def _averaged(self, node: fx.Node, given: Channels, dims: set[int]) -> Channels:
        if not dims or given.dim in dims:
            raise MismatchError("its channels meet in mean()")
        dropped = len(self.shapes[node]) < len(self.shapes[inputs_of(node)[0]])
        return Channels(given.dim - (sum(dim < given.dim for dim in dims) if dropped else 0), given.runs)

    def _flattened(self, node: fx.Node, given: Channels, start: int, end: int = -1) -> Channels:
        shape = self.shapes[inputs_of(node)[0]]
        start, end = start % len(shape), end % len(shape)
        if given.dim > start:
            raise MismatchError("its channels meet in flatten()")
        times = math.prod(shape[start + 1 : end + 1]) if given.dim == start else 1
        return Channels(given.dim, tuple(Run(run.space, run.each * times) for run in given.runs))

    def _use(self, role: str, node: fx.Node, channels: Channels) -> None:
        start = 0
        for run in channels.runs:
            self.uses[role].append(Use(node, start, run, str(node.target)))
            start += run.width

    def _refuse(self, node: fx.Node, given: Channels | None, dim: int) -> None:
        """Raise where a layer is none of which channels can be taken away."""
        if node.target in self._odd:
            raise MismatchError(self._odd[str(node.target)])
        if given is not None and given.dim != dim:
            raise MismatchError("a layer reads something else of it than channels")


def _is_one_slope(layer: nn.Module) -> bool:
    return isinstance(layer, nn.PReLU) and layer.num_parameters == 1


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Return the operations whose results one takes."""
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
