"""Boundaries of a student that is narrower than its teacher: each channel the mean of some of the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.planning.unit import Channels


def narrowed(channels: Channels | None, x: Tensor) -> Tensor:
    """Return what a student's boundary is of the teacher's (B, C, ...); None: all of it."""
    return x if channels is None else ChannelMap(channels, x.device)(x)


class ChannelMap:
    """What a student's boundary is of the teacher's. Called with (B, C, ...), returns (B, len(channels), ...), in
    channels_last where the teacher's is."""

    def __init__(self, channels: Channels, device: torch.device) -> None:
        """Raises ValueError where a channel is the mean of nothing."""
        if not channels or not all(channels):
            raise ValueError("every channel of a student is the mean of one or more of the teacher's")
        flat = [one for group in channels for one in group]
        self._index = torch.tensor(flat, device=device)
        self._group = torch.tensor([n for n, group in enumerate(channels) for _ in group], device=device)
        self._sizes = torch.tensor([float(len(group)) for group in channels], device=device)
        # No group is empty: where there are as many as channels taken, each has one, and nothing is to be summed.
        self._sliced = len(flat) == len(channels)

    def __call__(self, x: Tensor) -> Tensor:
        taken = x.index_select(1, self._index)
        if not self._sliced:
            sums = x.new_zeros(len(x), len(self._sizes), *x.shape[2:]).index_add_(1, self._group, taken)
            taken = sums / self._sizes.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return taken.contiguous(memory_format=torch.channels_last) if last else taken
