"""A teacher that computes in bf16: a chain under autocast, every boundary rounded to bf16 wherever it is computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain


class Bf16Chain(Chain):
    """`chain` under autocast. Rounding at every boundary, kept or not, makes a teacher that is spread over ranks give
    the bits of one that is not."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.blocks = chain.blocks
        self.boundaries = tuple(replace(boundary, dtype=torch.bfloat16) for boundary in chain.boundaries)
        self.first_convolution = chain.first_convolution

    @property
    def divisible(self) -> bool:
        return self._chain.divisible

    def run(self, x: Tensor, *, last: int, keep: Collection[int], first: int = 0) -> dict[int, Tensor]:
        if self.divisible:
            return self.run_blocks(x.bfloat16(), last=last, keep=keep, first=first)
        with _autocast(x):
            kept = self._chain.run(x.bfloat16(), last=last, keep=keep, first=first)
        return {boundary: tensor.bfloat16() for boundary, tensor in kept.items()}

    def run_block(self, index: int, x: Tensor) -> Tensor:
        with _autocast(x):
            return self._chain.run_block(index, x.bfloat16()).bfloat16()

    def counted(self, x: Tensor, counter: Callable[[], float]) -> Iterator[tuple[float, Tensor]]:
        if self.divisible:
            yield from super().counted(x, counter)
            return
        with _autocast(x):  # the hooked network runs as a whole before anything is yielded
            readings = list(self._chain.counted(x.bfloat16(), counter))
        yield from ((seconds, tensor.bfloat16()) for seconds, tensor in readings)

    def run_with(self, students: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        return self._chain.run_with(students, x)

    def block_module(self, index: int) -> nn.Module:
        return self._chain.block_module(index)


def _autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16)
