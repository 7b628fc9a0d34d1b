"""How the tensors of a network lie in memory: in channels_last, where convolutions are fast, and each on its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def to_channels_last(network: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Move `network` to the device, where one is given, and its tensors of four dimensions, the only ones that have
    such a format, into channels_last; in place. Returns the network."""
    if device is not None:
        network.to(device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == 4 and tensor.layout is torch.strided:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return network


def without_overlaps(network: nn.Module) -> nn.Module:
    """Give tensors whose elements share memory (expand()), into which nothing can be loaded, one place for each; in
    place. Returns the network."""
    for tensor in (*network.parameters(), *network.buffers()):
        plain = not is_lazy(tensor) and tensor.layout is torch.strided
        if plain and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor.data = tensor.data.contiguous()
    return network
