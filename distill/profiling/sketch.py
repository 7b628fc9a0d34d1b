"""Covariances of many inputs in bounded memory: their largest directions, and the variance of each input beside these.

Rows are centred and kept until there is no room, then the directions that hold most of their variance stand for them.
As many rows as there is room for, or fewer, give their covariance exactly. In float64, from rows in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROOM = 2**29  # bytes of the rows of one layer; as many again while they are condensed
MOST_ROWS = 2048  # however narrow: to condense them takes seconds


@dataclass(frozen=True)
class Sketch:
    """A covariance F F^T + diag(rest), of `factors` F (d, k) and `rest` (d); it stands on either side of @ as the
    matrix (d, d) would. Its diagonal is exact."""

    factors: Tensor
    rest: Tensor

    @property
    def variances(self) -> Tensor:
        """Its diagonal (d)."""
        return self.factors.square().sum(1) + self.rest

    @property
    def share(self) -> float:
        """How much of the inputs' variance is in its directions, with what inputs have in common; 1 where all is."""
        held = self.factors.square().sum()
        return float(held / (held + self.rest.sum()).clamp_min(torch.finfo(held.dtype).tiny))

    def __rmatmul__(self, left: Tensor) -> Tensor:
        return left @ self.factors @ self.factors.T + left * self.rest

    def __matmul__(self, right: Tensor) -> Tensor:
        return self.factors @ (self.factors.T @ right) + self.rest[:, None] * right

    def raised(self, variance: Tensor) -> Sketch:
        """Return it with so much variance more in every direction."""
        return replace(self, rest=self.rest + variance)

    def within(self, inputs: Tensor) -> Sketch:
        """Return that of these inputs alone."""
        return Sketch(self.factors[inputs], self.rest[inputs])


class Sketching:
    """Rows of `width` numbers on their way into a sketch.

    Source: Ross, Lim, Lin, Yang 2008, "Incremental learning for robust visual tracking", for the mean that moves; what
    is cut off is kept here as variance of the inputs.
    """

    def __init__(self, width: int) -> None:
        self._kept = torch.empty(rows_with_room(width), width, dtype=torch.float64)
        self._used = 0
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._sum = torch.zeros(width, dtype=torch.float64)
        self.rows = 0

    def add(self, rows: Tensor) -> None:
        """Take rows (n, width) in."""
        if not len(rows):
            return
        rows = rows.double().cpu()
        mean = rows.mean(0)
        if self.rows:  # two means are variance too
            weight = (self.rows * len(rows) / (self.rows + len(rows))) ** 0.5
            self._keep(weight * (mean - self.mean)[None])
        self._keep(rows - mean)
        self._sum += rows.sum(0)
        self.rows += len(rows)

    def _keep(self, centred: Tensor) -> None:
        self._squares += centred.square().sum(0)
        for part in torch.split(centred, len(self._kept) // 2):
            if self._used + len(part) > len(self._kept):
                self._condense()
            self._kept[self._used : self._used + len(part)] = part
            self._used += len(part)

    def _condense(self) -> None:
        """Leave half of the room, with the directions that hold most."""
        kept = self._kept[: self._used]
        vectors = torch.linalg.eigh(kept @ kept.T).eigenvectors[:, -(len(self._kept) // 2) :]
        self._used = vectors.shape[1]
        self._kept[: self._used] = vectors.T @ kept

    @property
    def mean(self) -> Tensor:
        return self._sum / max(1, self.rows)

    @property
    def covariance(self) -> Sketch:
        rows = max(1, self.rows)
        factors = self._kept[: self._used].T / rows**0.5
        rest = self._squares / rows - factors.square().sum(1)
        return Sketch(factors, rest.clamp_min(0.0))


def rows_with_room(width: int) -> int:
    """Return the rows that are kept, an even number of them."""
    return 2 * max(1, min(MOST_ROWS, ROOM // (8 * width)) // 2)
