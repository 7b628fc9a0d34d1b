"""Accuracy, size, FLOPs and latency of a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill.aliases import each_once
from distill.cost import count_flops, measure_seconds
from distill.data import Batch


@dataclass(frozen=True)
class Hits:
    """Counts over some test images; counts of several ranks add up exactly, whatever the layout."""

    top1: int = 0
    top5: int = 0
    images: int = 0

    def __add__(self, other: Hits) -> Hits:
        return Hits(self.top1 + other.top1, self.top5 + other.top5, self.images + other.images)

    def percent(self) -> dict[str, float]:
        """Return top-1 and top-5 accuracy in percent."""
        return {"top1": 100 * self.top1 / max(1, self.images), "top5": 100 * self.top5 / max(1, self.images)}


@torch.no_grad()
def count_hits(network: nn.Module, batches: Iterable[Batch]) -> Hits:
    """Return how many images a network in eval mode classifies rightly, first guess and first five guesses."""
    network.eval()
    total = Hits()
    for batch in batches:
        logits = network(batch.images)
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
        right = guesses == batch.labels[:, None]
        total += Hits(int(right[:, 0].sum()), int(right.any(dim=1).sum()), len(batch.labels))
    return total


@torch.no_grad()
def measure_network(network: nn.Module, *, image_shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return parameters, bytes of the state dict, FLOPs of one image (two per multiply-add) and the median latency in
    milliseconds at batch 1 and 64, forward only, in the precision of the weights."""
    network.eval()
    image = torch.zeros(1, *image_shape, device=device).to(memory_format=torch.channels_last)
    batch = torch.zeros(64, *image_shape, device=device).to(memory_format=torch.channels_last)
    return {
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "bytes": sum(tensor.nbytes for tensor in each_once(network.state_dict()).values()),
        "flops": count_flops(lambda: network(image)),
        "latency_ms_batch1": 1000 * measure_seconds(lambda: network(image), device),
        "latency_ms_batch64": 1000 * measure_seconds(lambda: network(batch), device),
    }
