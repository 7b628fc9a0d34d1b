"""Cuts a network into blocks with one tensor in and one out, and runs them. Knows nothing of students or ranks.

`cut` is the door. A network that torch.fx can trace becomes a TracedChain, whose blocks run one by one. Where that
fails, and where listed modules begin or end while a skip connection is alive, a HookedChain runs the whole network and
listens at their edges.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx, nn

from distill.blocks.chain import Block, Boundary, Chain, made_trainable, parameter_owners
from distill.blocks.grouping import Granularity, Group, NotACutPointError, group
from distill.blocks.hooks import HookedChain
from distill.blocks.misfit import channel_misfit
from distill.blocks.obstacle import obstacle
from distill.blocks.patterns import check_listed, expand
from distill.blocks.tracing import MODULE_STACK, Trace, UntraceableError, trace
from distill.errors import ConfigError

__all__ = ["Block", "Boundary", "Chain", "Granularity", "HookedChain", "TracedChain", "cut"]


def cut(model: nn.Module, sample: Tensor, *, granularity: Granularity, modules: Sequence[str] = ()) -> Chain:
    """Return `model` as a chain of blocks; puts it in eval mode and freezes its parameters.

    `sample` (B, ...) is an input on the model's device; its form fixes that of all boundaries. `modules` are paths or
    shell patterns of them. Raises ConfigError on data.image_size, blocks.granularity or blocks.modules.
    """
    model.eval().requires_grad_(False)
    output = run_sample(model, sample)
    if not isinstance(output, Tensor):
        raise ConfigError("teacher", type(output).__name__, "a network whose output is one tensor")
    modules = expand(model, modules)
    if granularity is Granularity.modules:
        check_listed(model, modules)
    try:
        traced = trace(model, sample, output)
        groups = group(traced, granularity=granularity, modules=modules)
        return TracedChain(traced, groups, remark=_remark(traced, groups, granularity))
    except UntraceableError as error:
        if granularity is not Granularity.modules:
            raise _needs_list(granularity, error) from error
    except NotACutPointError:
        pass  # a skip connection passes by, which does not keep hooks from hearing the module's own tensors
    return HookedChain(model, sample, output, modules)


def _remark(traced: Trace, groups: Sequence[Group], granularity: Granularity) -> str | None:
    """Return in words why all of several convolutions ended up in one block, where they did."""
    holding = [[node for node in one.nodes if isinstance(traced.module(node), nn.Conv2d)] for one in groups]
    holding = [nodes for nodes in holding if nodes]
    if granularity is Granularity.modules or len(holding) != 1 or len(holding[0]) == 1:
        return None
    segments = [one for one in traced.segments if any(isinstance(traced.module(node), nn.Conv2d) for node in one.nodes)]
    if len(segments) > 1:
        why, way = f"blocks.granularity={granularity.name} joins them", "blocks.granularity=conv cuts finer, or"
    else:
        why, way = obstacle(traced), "change that, or"
    return (
        f"one block holds all {len(holding[0])} convolutions, so nothing is trained in parallel: {why}; {way} name "
        "modules: blocks.granularity=modules blocks.modules=[...]"
    )


def _needs_list(granularity: Granularity, error: UntraceableError) -> ConfigError:
    reason = str(error).partition("\n")[0]
    allowed = (
        f"modules, because this network cannot be traced by torch.fx ({reason}); "
        "name its blocks: blocks.granularity=modules blocks.modules=[...]"
    )
    return ConfigError("blocks.granularity", granularity.name, allowed)


@torch.no_grad()
def run_sample(model: nn.Module, sample: Tensor) -> object:
    """Return what `model` gives for a batch. Raises ConfigError on data.image_size where it fails."""
    try:
        return model(sample)
    # A RuntimeError too, but not one that another size of image is the answer to.
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        misfit = channel_misfit(model, sample)
        if misfit:
            raise misfit from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        allowed = f"images that the network accepts; with a batch of {tuple(sample.shape)} it says: {reason}"
        raise ConfigError("data.image_size", tuple(sample.shape[2:]), allowed) from error


class TracedChain(Chain):
    """A chain of traced blocks, each a module of its own."""

    def __init__(self, traced: Trace, groups: Sequence[Group], *, remark: str | None = None) -> None:
        self.remark = remark
        self.blocks = tuple(_facts(traced, index, one) for index, one in enumerate(groups))
        self.first_convolution = next((path for block in self.blocks for path in block.convolutions), None)
        sources = [one.segments[0].source for one in groups]
        self.boundaries = tuple(traced.forms[node] for node in [*sources, groups[-1].segments[-1].result])
        self._state_names = set(traced.root.state_dict())
        self._modules = [self._named(fx.GraphModule(traced.root, _graph(one), "Block")).eval() for one in groups]

    @property
    def divisible(self) -> bool:
        return True

    def run(self, x: Tensor, *, last: int, keep: Collection[int], first: int = 0) -> dict[int, Tensor]:
        assert all(first <= boundary <= last <= len(self.blocks) for boundary in keep), (first, last, keep)
        return self.run_blocks(x, last=last, keep=keep, first=first)

    @torch.no_grad()
    def run_block(self, index: int, x: Tensor) -> Tensor:
        # Also where nothing is kept: kernels depend on strides, and a relayed activation has the recorded ones.
        x = self.boundaries[index].conform(x)
        return self.boundaries[index + 1].conform(self._modules[index](x))

    def block_module(self, index: int) -> nn.Module:
        return made_trainable(self._named(copy.deepcopy(self._modules[index])))

    def _named(self, module: nn.Module) -> nn.Module:
        """Keep buffers out of `module`'s state_dict that are not in the network's: fx registers what it reads."""
        for path, owner in module.named_modules():
            for name in owner._buffers:
                if ".".join(filter(None, (path, name))) not in self._state_names:
                    owner._non_persistent_buffers_set.add(name)
        return module


def _graph(block: Group) -> fx.Graph:
    """Return the operations of a block as a graph from one input to one output."""
    graph = fx.Graph()
    copies = {block.segments[0].source: graph.placeholder("x")}
    for node in block.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {key: node.meta[key] for key in (MODULE_STACK,) if key in node.meta}
    graph.output(copies[block.segments[-1].result])
    return graph


def _facts(traced: Trace, index: int, block: Group) -> Block:
    convolutions: dict[str, None] = {}  # a dict, to keep the order and drop repeats
    owners: dict[str, None] = {}
    for node in block.nodes:
        path = str(node.target)
        module = traced.module(node)
        if isinstance(module, nn.Conv2d):
            convolutions[path] = None
        if module is not None:
            owners.update(dict.fromkeys(parameter_owners(module, path)))
        elif node.op == "get_attr" and path in dict(traced.root.named_parameters()):
            owners[path.rpartition(".")[0]] = None
    return Block(index, block.name, tuple(convolutions), tuple(owner for owner in owners if owner))
