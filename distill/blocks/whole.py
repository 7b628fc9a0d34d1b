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
    paths = {block.index: path for block in chain.blocks if (path := _holder(network, block)) is not None}
    heard: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in paths}
    with ExitStack() as stack:
        for index, path in paths.items():

            def hear(_: nn.Module, args: tuple[object, ...], kwargs: object, out: object, index: int = index) -> None:
                if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                    heard[index].append((args[0].clone(), out.clone()))  # a layer behind may work in place

            stack.callback(network.get_submodule(path).register_forward_hook(hear, with_kwargs=True).remove)
        network(images)
    edges = {edge for index in paths for edge in (index, index + 1)}
    kept = chain.run(images, last=max(edges, default=0), keep=edges)
    return {
        index: path
        for index, path in paths.items()
        if len(heard[index]) == 1
        and all(agree(kept[index + side], tensor) for side, tensor in enumerate(heard[index][0]))
    }


def _holder(network: nn.Module, block: Block) -> str | None:
    """Return the path of the innermost module that holds the block's weights and no others, or None."""
    split = [path.split(".") for path in block.modules]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    path = ".".join(shared)
    if not path or set(parameter_owners(network.get_submodule(path), path)) != set(block.modules):
        return None
    return path
