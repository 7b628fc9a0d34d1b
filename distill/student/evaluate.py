"""Accuracy, size, FLOPs and latency of a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.data import Batch
from distill.profiling.block_costs import count_flops, measure_seconds
from distill.storage.aliases import each_once

NO_ANSWER = -1  # in the place of a class
# Images that are evaluated at a time, fewer where they are large. 250 of CIFAR took a third more: their activations are
# memory that is asked for anew (ResNet-20, one core of an AMD EPYC with 1 MiB of L2).
AT_A_TIME, PIXELS_AT_A_TIME = 100, 2**21


@dataclass(frozen=True)
class Hits:
    """Counts over some images; counts of several ranks add up exactly. An image whose logits are not all finite numbers
    is a miss."""

    top1: int = 0
    top5: int = 0
    images: int = 0
    not_finite: int = 0

    def __add__(self, other: Hits) -> Hits:
        return Hits(*(own + others for own, others in zip(astuple(self), astuple(other), strict=True)))

    def percent(self) -> dict[str, float | None]:
        """Return top-1 and top-5 accuracy in percent; None where there is no image."""
        return {name: 100 * getattr(self, name) / self.images if self.images else None for name in ("top1", "top5")}

    @property
    def standard_error(self) -> float:
        """How far the top-1 accuracy may be from that on all such images, in percent of them: one standard deviation.

        By Laplace's estimate, one hit and one miss added, so that a few images are not trusted for being all right.
        """
        share = (self.top1 + 1) / (self.images + 2)
        return 100 * math.sqrt(share * (1 - share) / max(1, self.images))


@dataclass(frozen=True)
class Guesses:
    """What a network took some images for.

    Shapes: labels (images), best (images, at most 5): classes from the likeliest on, NO_ANSWER where logits were not
    all finite.
    """

    labels: Tensor
    best: Tensor

    @property
    def first(self) -> Tensor:
        """The likeliest class of every image."""
        return self.best[:, 0]

    @property
    def hits(self) -> Hits:
        right = self.best == self.labels[:, None]
        first, any_of_them, none = right[:, 0].sum(), right.any(dim=1).sum(), (self.first == NO_ANSWER).sum()
        return Hits(int(first), int(any_of_them), len(self.labels), int(none))


def best_of(hits: Mapping[str, Hits]) -> str | None:
    """Return the name with the most hits, the last of equals; None where none gives finite logits for all images."""
    sound = [name for name, one in hits.items() if not one.not_finite]
    return max(reversed(sound), key=lambda name: hits[name].top1, default=None)


def images_at_a_time(image_shape: tuple[int, ...]) -> int:
    """Return how many images (channels, height, width) to evaluate at a time: activations of many large ones would fill
    the memory."""
    return max(1, min(AT_A_TIME, PIXELS_AT_A_TIME // math.prod(image_shape[1:])))


@torch.no_grad()
def guesses_of(networks: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, Guesses]:
    """Return the first guesses of networks in eval mode, in host memory. Every batch is read once, for all of them."""
    for network in networks.values():
        network.eval()
    labels = [torch.zeros(0, dtype=torch.long)]
    best: dict[str, list[Tensor]] = {name: [] for name in networks}
    for batch in batches:
        labels.append(batch.labels.cpu())
        for name, network in networks.items():
            best[name].append(_first_guesses(network(batch.images)))
    none = torch.zeros(0, 1, dtype=torch.long)
    return {name: Guesses(torch.cat(labels), torch.cat(found or [none])) for name, found in best.items()}


def _first_guesses(logits: Tensor) -> Tensor:
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    # topk takes NaN for the largest number: such a guess could be right by its place alone.
    return guesses.masked_fill(~logits.isfinite().all(dim=1)[:, None], NO_ANSWER).cpu()


def count_hits(network: nn.Module, batches: Iterable[Batch]) -> Hits:
    """Return how many images a network in eval mode classifies rightly, first guess and first five guesses."""
    return guesses_of({"network": network}, batches)["network"].hits


def first_not_finite(network: nn.Module) -> str | None:
    """Return the name of the first parameter that holds nan or infinity, or batch-norm statistic that holds nan."""
    for name, tensor in network.named_parameters():
        if not tensor.isfinite().all():
            return name
    return next((name for name, tensor in network.named_buffers() if tensor.isnan().any()), None)


@torch.no_grad()
def measure_network(network: nn.Module, *, image_shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return parameters, those that are not zero, bytes of the state dict, FLOPs of an image (two a multiply-add) and
    the median latency in milliseconds at batch 1 and 64, forward only, in the precision of the weights."""
    network.eval()
    image = torch.zeros(1, *image_shape, device=device).to(memory_format=torch.channels_last)
    batch = torch.zeros(64, *image_shape, device=device).to(memory_format=torch.channels_last)
    return {
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "nonzero_params": sum(int(parameter.count_nonzero()) for parameter in network.parameters()),
        "bytes": sum(tensor.nbytes for tensor in each_once(network.state_dict()).values()),
        "flops": count_flops(lambda: network(image)),
        "latency_ms_batch1": 1000 * measure_seconds(lambda: network(image), device),
        "latency_ms_batch64": 1000 * measure_seconds(lambda: network(batch), device),
    }
