"""Which blocks are exactly one module of the network, so that another module can stand in that place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from distill.blocks.chain import Block, Chain, agree, parameter_owners


@torch.no_grad()
def whole_modules(network: nn.Module, chain: Chain, images: Tensor) -> Mapping[int, str]:
    """Return, by block, the path of the module of `network` that turns the block's input into its output.

    Shown on `images`, because code between a block's modules is seen in no tree of them: a module counts where it holds
    the block's weights and no others, runs once, and is given and gives what the chain has at the block's boundaries.
    """
    places = [(block.index, path) for block in chain.blocks for path in _holders(network, block)]
    heard: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {place: [] for place in places}
    with ExitStack() as stack:
        for place, calls in heard.items():

            def hear(
                _: nn.Module,
                args: tuple[object, ...],
                kwargs: object,
                out: object,
                calls: list[tuple[Tensor, Tensor]] = calls,
            ) -> None:
                if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                    calls.append((args[0].clone(), out.clone()))  # a layer behind may work in place

            stack.callback(network.get_submodule(place[1]).register_forward_hook(hear, with_kwargs=True).remove)
        network(images)
    edges = {edge for index, _ in places for edge in (index, index + 1)}
    kept = chain.run(images, last=max(edges, default=0), keep=edges)
    return {
        index: path
        for index, path in reversed(places)  # of several that are the block, the innermost
        if len(heard[index, path]) == 1
        and all(agree(kept[index + side], tensor) for side, tensor in enumerate(heard[index, path][0]))
    }


def _holders(network: nn.Module, block: Block) -> list[str]:
    """Return the paths of the modules that hold the block's weights and no others, the innermost first: one around a
    branch alone may hold as much as the one that adds the shortcut."""
    split = [path.split(".") for path in block.modules]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    paths = [".".join(shared[:depth]) for depth in range(len(shared), 0, -1)]
    return [path for path in paths if set(parameter_owners(network.get_submodule(path), path)) == set(block.modules)]
