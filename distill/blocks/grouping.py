"""Groups a network's segments into blocks of the asked size and names them. Runs nothing, builds no module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from torch import fx, nn

from distill.blocks.tracing import CONTAINERS, Segment, Trace, module_stack
from distill.errors import ConfigError

Piece = list[Segment]  # neighbouring segments that stay together

_COMPUTE_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
_COMPUTE_FUNCTIONS = frozenset(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)) | {
    "linear",
    "bilinear",
    "multi_head_attention_forward",
    "shifted_window_attention",
}
_AVERAGE_POOLS = frozenset(("avgpool2d", "avg_pool2d"))


class NotACutPointError(Exception):
    """More than one tensor is alive at the edge of a listed module: only hooks can make it a block."""


class Granularity(Enum):
    """How large a block is."""

    conv = "conv"  # from one convolution, or other layer with a weight matrix, to the next
    residual = "residual"  # the same, but a residual or multi-path unit stays whole
    resolution = "resolution"  # neighbours whose convolutions work at one spatial size
    modules = "modules"  # an explicit list of module paths


@dataclass(frozen=True, eq=False)
class Group:
    """The segments of one block, and its name."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def nodes(self) -> list[fx.Node]:
        """All operations, in order."""
        return [node for segment in self.segments for node in segment.nodes]


def group(trace: Trace, *, granularity: Granularity, modules: Sequence[str] = ()) -> list[Group]:
    """Return the blocks of a traced network in order; together they hold every segment once.

    `modules` are checked paths. Raises ConfigError on blocks.modules if one of them cannot be a block, and
    NotACutPointError where only other tensors that pass by stand against it.
    """
    if granularity is Granularity.modules:
        return _group_modules(trace, modules)
    pieces = [[segment] for segment in trace.segments]
    if granularity is not Granularity.conv:
        pieces = _join_units(trace, pieces)
    head_start = _head_start(trace, pieces)
    body = _gather(trace, pieces[:head_start])
    if granularity is Granularity.resolution:
        sizes = groupby(body, key=lambda block: _resolution(trace, block))
        body = [_flat(same) for _, same in sizes]
    head = _flat(pieces[head_start:])
    return _named(trace, [*body, head] if head else body, ends_in_head=bool(head))


def is_compute(trace: Trace, node: fx.Node) -> bool:
    """True for a layer that is worth a block of its own: one that multiplies by a weight matrix."""
    return isinstance(trace.module(node), _COMPUTE_LAYERS) or _operation(trace, node) in _COMPUTE_FUNCTIONS


def _operation(trace: Trace, node: fx.Node) -> str:
    """Return a lower-case word for what a node does: "conv2d", "adaptiveavgpool2d", "mean"."""
    if node.op == "call_module":
        return type(trace.module(node)).__name__.lower()
    return str(getattr(node.target, "__name__", node.target)).lower()


def _flat(pieces: Iterable[Piece]) -> Piece:
    return [segment for piece in pieces for segment in piece]


def _compute_nodes(trace: Trace, piece: Iterable[Segment]) -> list[fx.Node]:
    return [node for segment in piece for node in segment.nodes if is_compute(trace, node)]


def _gather(trace: Trace, pieces: Iterable[Piece]) -> list[Piece]:
    """Start a block at each piece with a compute layer; what has none goes to the block before, or opens the first."""
    blocks: list[Piece] = []
    opening = True  # until the first compute layer everything belongs to the first block
    for piece in pieces:
        computes = bool(_compute_nodes(trace, piece))
        if blocks and (opening or not computes):
            blocks[-1] += piece
        else:
            blocks.append(list(piece))
        opening = opening and not computes
    return blocks


def _head_start(trace: Trace, pieces: Sequence[Piece]) -> int:
    """Return the index of the first piece of the head: the closing pooling or flattening and the layers behind it."""
    last = len(pieces)
    spatial = [i for i, piece in enumerate(pieces) if any(_rank(trace, n) > 2 for n in _compute_nodes(trace, piece))]
    behind = range(spatial[-1] + 1 if spatial else 0, last)
    computing = [i for i in behind if _compute_nodes(trace, pieces[i])]
    if not computing:
        return last
    return next((i for i in behind if i < computing[0] and _opens_head(trace, pieces[i])), computing[0])


def _rank(trace: Trace, node: fx.Node) -> int:
    return len(trace.forms[node].shape) if node in trace.forms else 0


def _opens_head(trace: Trace, piece: Piece) -> bool:
    """True for global pooling and for flattening: it leaves no spatial dimensions, or one value in each."""
    if _rank(trace, piece[0].source) > 2 and _rank(trace, piece[-1].result) == 2:
        return True
    single = set(trace.forms[piece[-1].result].shape[2:]) == {1}
    names = [_operation(trace, node) for segment in piece for node in segment.body]
    return any(name.startswith("adaptive") or name == "mean" or (single and name in _AVERAGE_POOLS) for name in names)


def _join_units(trace: Trace, pieces: Sequence[Piece]) -> list[Piece]:
    """Join the pieces that a residual unit spans; where units are nested, the outermost counts."""
    classes = _unit_classes(trace)
    spans: dict[str, tuple[int, int]] = {}
    for index, piece in enumerate(pieces):
        for node in (node for segment in piece for node in segment.body):
            for call, _, kind in module_stack(node):
                if kind in classes:
                    first = spans.setdefault(call, (index, index))[0]
                    spans[call] = (first, index)
                    break
    joined_to_next = {index for first, last in spans.values() for index in range(first, last)}
    joined: list[Piece] = []
    for index, piece in enumerate(pieces):
        if index - 1 in joined_to_next:
            joined[-1] += piece
        else:
            joined.append(list(piece))
    return joined


def _unit_classes(trace: Trace) -> set[type]:
    """Return the classes of the smallest modules, containers aside, around each region with skips or parallel paths."""
    classes: set[type] = set()
    for segment in trace.segments:
        if not segment.branches or not _compute_nodes(trace, [segment]):
            continue
        stacks = [module_stack(node) for node in segment.body]
        around = [entry for entry in stacks[0] if all(entry in stack for stack in stacks)]
        kinds = [kind for _, path, kind in around if not _is_container(trace.root.get_submodule(path))]
        classes.update(kinds[-1:])
    return classes


def _is_container(module: nn.Module) -> bool:
    """True for a module that only calls its children in turn, or is never called itself."""
    return isinstance(module, CONTAINERS) and type(module).forward in {kind.forward for kind in CONTAINERS}


def _resolution(trace: Trace, block: Piece) -> tuple[int, ...]:
    """Return the spatial size of the block's last convolution, one-pixel ones (squeeze-excitation) aside."""
    computing = _compute_nodes(trace, block)
    convolutions = [node for node in computing if "conv" in _operation(trace, node) and _rank(trace, node) > 2]
    if convolutions:
        sizes = [trace.forms[node].shape[2:] for node in convolutions]
        return next((size for size in reversed(sizes) if set(size) != {1}), trace.forms[block[-1].result].shape[2:])
    # Without a convolution: the tokens of (B, tokens, C), or the grid of (B, H, W, C).
    tokens = [trace.forms[node].shape[1:-1] for node in computing if _rank(trace, node) > 2]
    return tokens[-1] if tokens else trace.forms[block[-1].result].shape[1:-1]


def _group_modules(trace: Trace, modules: Sequence[str]) -> list[Group]:
    groups: list[Group] = []
    done = 0
    for path in modules:
        first, last = _span_of(trace, path)
        if first < done:
            raise ConfigError(
                "blocks.modules", path, "the modules in the order in which they run; this one runs earlier"
            )
        if first > done:
            groups.append(Group(f"before {path}", trace.segments[done:first]))
        groups.append(Group(path, trace.segments[first : last + 1]))
        done = last + 1
    if done < len(trace.segments):
        groups.append(Group(f"after {modules[-1]}", trace.segments[done:]))
    return groups


def _span_of(trace: Trace, path: str) -> tuple[int, int]:
    """Return the indices of the first and last segment of module `path`, which must fill them exactly."""
    inside = []  # (segment, whether all of it belongs to the module) for each segment it touches
    calls: set[str] = set()
    for index, segment in enumerate(trace.segments):
        matches = [[call for call, at, _ in module_stack(node) if at == path] for node in segment.body]
        calls.update(call for match in matches for call in match)
        if any(matches):
            inside.append((index, all(matches)))
    if not inside:
        raise ConfigError("blocks.modules", path, "a module that the network runs and that computes something")
    if len(calls) > 1:
        raise ConfigError("blocks.modules", path, f"a module that runs once; this one runs {len(calls)} times")
    for index, whole in inside:
        if not whole:
            if _is_passed_by(trace.segments[index], path):
                raise NotACutPointError(path)
            allowed = "a module with one tensor in and one out; weights are shared across its edge"
            raise ConfigError("blocks.modules", path, allowed)
    return inside[0][0], inside[-1][0]


def _is_passed_by(segment: Segment, path: str) -> bool:
    """True if several values are alive at an edge of module `path` inside a segment that it does not fill."""
    nodes = [segment.source, *segment.body]
    inside = [any(at == path for _, at, _ in module_stack(node)) for node in nodes]
    inside[0] = inside[1]  # the tensor that comes in is no edge
    for edge in (place for place in range(len(nodes) - 1) if inside[place] != inside[place + 1]):
        later = set(nodes[edge + 1 :])
        if sum(bool(later & node.users.keys()) for node in nodes[: edge + 1]) > 1:
            return True
    return False


def _named(trace: Trace, blocks: Sequence[Piece], *, ends_in_head: bool) -> list[Group]:
    """Name each block after the longest module path around its compute layers, else after its first and last part."""
    paths = []
    for block in blocks:
        nodes = _compute_nodes(trace, block) or [node for segment in block for node in segment.body]
        paths.append([_path(node) for node in nodes])
    places = _places(paths)
    names = [_name(own, index, places) for index, own in enumerate(paths)]
    if ends_in_head and not _alone(_common_prefix(paths[-1]), len(paths) - 1, places):
        names[-1] = "head"
    again = Counter(names)
    unique = [f"{name}#{index}" if again[name] > 1 else name for index, name in enumerate(names)]
    return [Group(name, tuple(block)) for name, block in zip(unique, blocks, strict=True)]


def _places(paths: Sequence[Sequence[str]]) -> dict[str, set[int]]:
    """Return, for every path and its ancestors, the blocks that have something under it."""
    places: dict[str, set[int]] = {}
    for index, own in enumerate(paths):
        for path in own:
            parts = path.split(".")
            for depth in range(1, len(parts) + 1):
                places.setdefault(".".join(parts[:depth]), set()).add(index)
    return places


def _alone(path: str, index: int, places: Mapping[str, set[int]]) -> bool:
    return path != "" and places[path] == {index}


def _name(own: Sequence[str], index: int, places: Mapping[str, set[int]]) -> str:
    prefix = _common_prefix(own)
    if _alone(prefix, index, places):
        return prefix
    ends = []
    for path in (own[0], own[-1]):
        parts = path.split(".")
        around = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        ends.append(next((outer for outer in around if _alone(outer, index, places)), path or "block"))
    return ends[0] if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


def _path(node: fx.Node) -> str:
    stack = module_stack(node)
    return stack[-1][1] if stack else ""


def _common_prefix(paths: Sequence[str]) -> str:
    split = [path.split(".") for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
