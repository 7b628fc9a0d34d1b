"""A teacher whose passes are captured as CUDA graphs, one for each set of boundaries that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.cuda.graphs import Capture, Captured

MAX_GRAPHS = 4  # kept at a time; the set of boundaries changes when a block finishes


class GraphedChain(Chain):
    """`chain`, run as CUDA graphs. They may share memory: one runs at a time, and what it has found is copied."""

    def __init__(self, chain: Chain, capture: Capture) -> None:
        self._chain, self._capture = chain, capture
        self._graphs: dict[tuple[int, int, tuple[int, ...]], Captured] = {}
        self.blocks = chain.blocks
        self.boundaries = chain.boundaries
        self.first_convolution = chain.first_convolution

    @property
    def divisible(self) -> bool:
        return self._chain.divisible

    def run(self, x: Tensor, *, last: int, keep: Collection[int], first: int = 0) -> dict[int, Tensor]:
        kept = tuple(sorted(keep))
        key = (first, last, kept)
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]

            def work(images: Tensor) -> list[Tensor]:
                found = self._chain.run(images, first=first, last=last, keep=kept)
                return [found[boundary] for boundary in kept]

            self._graphs[key] = Captured(work, name="teacher", capture=self._capture)
        return dict(zip(kept, self._graphs[key](x), strict=True))

    def run_block(self, index: int, x: Tensor) -> Tensor:
        return self._chain.run_block(index, x)

    def counted(self, x: Tensor, counter: Callable[[], float]) -> Iterator[tuple[float, Tensor]]:
        return self._chain.counted(x, counter)

    def run_with(self, students: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        return self._chain.run_with(students, x)

    def block_module(self, index: int) -> nn.Module:
        return self._chain.block_module(index)
