"""Optimal brain surgeon where a layer has too many inputs for their covariance: by its sketch C = F F^T + D.

D is diagonal, and no matrix (d, d) is made. With the columns L left and R gone, K = 1 + F_L^T D_L^-1 F_L = M M^T and
W = M^-1 F_L^T D_L^-1, the inverse of C_LL is D_L^-1 - W^T W (Woodbury 1950, "Inverting modified matrices"), and the
best kernel with what is left A_L + A_R F_R M^-T W. Knows no layers. In float64 on the CPU, the same bits on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.profiling.sketch import Sketch

ROUNDS = 8  # after each the costs of what is left are computed anew: once a unit would be as many products
AT_A_TIME = 2**24  # numbers of a repaired kernel


class WideReader:
    """What a layer with kernel A (D, d) loses with each of n units, which are m columns each, as others are removed:
    what surgeon.Reader says, exact whenever another eighth of the units has gone."""

    def __init__(self, kernel_Dd: Tensor, sketch: Sketch, columns_nm: Tensor, rest: Tensor) -> None:
        """`rest` are the columns that are no unit's and stay; the sketch has some variance in every direction."""
        self._kernel, self._sketch, self._columns, self._rest = kernel_Dd, sketch, columns_nm, rest
        self._alive = torch.ones(len(columns_nm), dtype=torch.bool)
        self._removed = 0  # since costs were computed
        self._costs = torch.zeros(len(columns_nm), dtype=torch.float64)
        self._compute()

    def costs(self) -> Tensor:
        """Return what every unit costs (n); of those that are gone it means nothing."""
        if self._removed * ROUNDS >= len(self._columns):
            self._compute()
        return self._costs

    def remove(self, unit: int) -> None:
        """Take a unit away."""
        self._alive[unit] = False
        self._removed += 1

    def _compute(self) -> None:
        self._removed = 0
        units = self._alive.nonzero().flatten()
        if not len(units):
            return
        left = torch.cat([self._columns[units].flatten(), self._rest])
        seen, added = _left(self._kernel, self._sketch, left, self._columns[~self._alive].flatten())
        size = self._columns.shape[1]
        some = max(1, AT_A_TIME // (size * len(self._kernel)))
        for start in range(0, len(units), some):
            chunk = units[start : start + some]
            own = seen[:, start * size : (start + len(chunk)) * size]
            repaired = self._kernel[:, self._columns[chunk].flatten()] + added @ own
            w, kernel = (one.reshape(len(one), -1, size).transpose(0, 1) for one in (own, repaired))
            inverse = torch.diag_embed(1 / self._sketch.rest[self._columns[chunk]]) - w.transpose(1, 2) @ w
            shares = torch.linalg.solve(inverse, kernel.transpose(1, 2) @ kernel)
            self._costs[chunk] = shares.diagonal(dim1=1, dim2=2).sum(1)


def repaired_wide(kernel_Dd: Tensor, sketch: Sketch, columns: Tensor) -> Tensor:
    """Return the kernel (D, d) that has only these columns, the others zero, and whose outputs differ least."""
    gone = torch.ones(kernel_Dd.shape[1], dtype=torch.bool)
    gone[columns] = False
    seen, added = _left(kernel_Dd, sketch, columns, gone.nonzero().flatten())
    kernel = torch.zeros_like(kernel_Dd)
    kernel[:, columns] = kernel_Dd[:, columns] + added @ seen
    return kernel


def _left(kernel: Tensor, sketch: Sketch, left: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return W (k, n) of the columns that are left, and what times W their kernel gains: A_R F_R M^-T (D, k)."""
    weighted = sketch.factors[left] / sketch.rest[left, None]
    inner = sketch.factors[left].T @ weighted
    inner.diagonal().add_(1.0)
    root = torch.linalg.cholesky(inner)
    seen = torch.linalg.solve_triangular(root, weighted.T, upper=False)
    missing = kernel[:, gone] @ sketch.factors[gone]
    return seen, torch.linalg.solve_triangular(root, missing.T, upper=False).T
