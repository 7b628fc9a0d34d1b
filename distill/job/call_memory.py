"""How much memory a call of a network takes: its weights, and the activations that are alive at once at most.

Weights of blocks add up, peaks of activations do not: where blocks follow one another, what is alive while one of them
computes is its own business, and the student's peak is that of its most demanding block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from distill.blocks.chain import Chain
from distill.job.swaps import Amounts, Swap, row_of, weight_bytes
from distill.profiling.liveness import peak_activations

MEMORY = "memory"


def memory_of_call(network: nn.Module, image_shape: tuple[int, ...], batch: int) -> float:
    """Return the bytes of a call of a whole network on so many images."""
    return weight_bytes(network) + peak_activations(network, torch.empty(batch, *image_shape, device="meta"))


def with_peaks(chain: Chain, swaps: Sequence[Swap], batch: int) -> tuple[tuple[Swap, ...], dict[int, Amounts], float]:
    """Return the swaps with their peaks on so many images, those of the teacher's own blocks that they stand for, both
    above the teacher's highest; and that one, in bytes. The chain is divisible."""

    def peak(first: int, end: int, students: Mapping[int, nn.Module] | None = None) -> float:
        shape = (batch, *chain.boundaries[first].shape[1:])
        return float(peak_activations(row_of(chain, first, end, students), torch.empty(shape, device="meta")))

    own = {block.index: peak(block.index, block.index + 1) for block in chain.blocks}
    highest, changing = max(own.values()), {block for swap in swaps for block in swap.covers}
    # Blocks that no swap stands for are there in every student.
    least = max((size for block, size in own.items() if block not in changing), default=0.0)

    def with_peak(swap: Swap) -> Swap:
        size = peak(swap.first, swap.end, swap.students(chain))
        more = {MEMORY: max(least, size) - highest}
        return replace(swap, amounts={**swap.amounts, MEMORY: swap.amounts["bytes"]}, peaks=more)

    kept: dict[int, Amounts] = {block: {MEMORY: max(least, own[block]) - highest} for block in changing}
    return tuple(with_peak(swap) for swap in swaps), kept, highest
