"""Optimal brain surgeon over channels: which inputs a layer can best do without, and what its other weights become.

The error is E ||A x - A' x||^2 over centred inputs x with covariance C, for which everything is exact. Knows no layers.
Source: Hassibi and Stork 1992, "Second order derivatives for network pruning: optimal brain surgeon", here of a layer's
own output, a unit of several columns at a time. In float64 on the CPU, so that every rank gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.profiling.sketch import Sketch
from distill.recipes.least_squares import DAMPING, mean_variance
from distill.recipes.wide_surgeon import WideReader, repaired_wide

DELAYED = 256  # columns removed before the large matrices are brought up to date: one product for many thin ones


def regularized(covariance: Tensor | Sketch) -> Tensor | Sketch:
    """Return a covariance (d, d) that has an inverse; more is added to one that rounding has left without."""
    damping = (DAMPING * mean_variance(covariance)).clamp_min(torch.finfo(torch.float64).tiny ** 0.25)
    if isinstance(covariance, Sketch):
        return covariance.raised(damping)
    identity = torch.eye(len(covariance), dtype=torch.float64)
    while int(torch.linalg.cholesky_ex(covariance + damping * identity).info) > 0:
        damping = 10 * damping
    return covariance + damping * identity


class Reader:
    """What a layer with kernel A (D, d) loses with each of n units, which are m columns each, as others are removed.

    With H = C^-1 over the columns that are left, and A repaired so that it is best with them, unit c costs
    tr(A_c H_cc^-1 A_c^T). Removing it takes u u^T from H and A_c H_cc^-1 H_c: from A, where u = H_:c L^-T and
    L L^T = H_cc. Of A only G = A^T A is needed, which loses u z + (u z)^T, z = L^-1 G_c: - L^-1 G_cc L^-T u^T / 2.
    """

    def __init__(self, kernel_Dd: Tensor, covariance: Tensor, columns_nm: Tensor, rest: Tensor) -> None:
        """`rest` are the columns that are no unit's and stay; `covariance` must have an inverse."""
        self._units, self._size = columns_nm.shape
        order = torch.cat([columns_nm.flatten(), rest])
        kernel = kernel_Dd[:, order]
        self._h = torch.cholesky_inverse(torch.linalg.cholesky(covariance[order][:, order]))
        self._g = kernel.T @ kernel
        self._h_cc, self._g_cc = self._diagonal(self._h), self._diagonal(self._g)
        self._left = torch.arange(self._units)  # the units whose columns the large matrices have, in order
        self._start()

    def _start(self) -> None:
        self._delayed: list[int] = []  # places among those left
        room = max(1, DELAYED // self._size) * self._size
        self._u = torch.zeros(room, len(self._h), dtype=torch.float64)
        self._z = torch.zeros_like(self._u)

    def _diagonal(self, matrix: Tensor) -> Tensor:
        """Return the units' own blocks (n, m, m)."""
        n, m = self._units, self._size
        blocks: Tensor = matrix[: n * m, : n * m].reshape(n, m, n, m).diagonal(dim1=0, dim2=2)
        return blocks.permute(2, 0, 1).clone()

    def costs(self) -> Tensor:
        """Return what every unit costs (n), in the order of `columns_nm`; of those that are gone it means nothing."""
        if self._size == 1:
            return (self._g_cc / self._h_cc).flatten()
        shares: Tensor = torch.linalg.solve(self._h_cc, self._g_cc)
        return shares.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Take a unit away, and repair the others for it."""
        place = int(torch.searchsorted(self._left, unit))
        own = slice(place * self._size, (place + 1) * self._size)
        used = len(self._delayed) * self._size
        u, z = self._u[:used], self._z[:used]
        h_c = self._h[own] - u[:, own].T @ u
        g_c = self._g[own] - u[:, own].T @ z - z[:, own].T @ u
        factor = torch.linalg.cholesky(h_c[:, own])
        new_u = torch.linalg.solve_triangular(factor, h_c, upper=False)
        half = torch.linalg.solve_triangular(factor, g_c, upper=False)
        inner = torch.linalg.solve_triangular(factor, half[:, own].T, upper=False)
        new_z = half - inner @ new_u / 2
        self._u[used : used + self._size], self._z[used : used + self._size] = new_u, new_z
        self._delayed.append(place)
        self._update_diagonal(new_u, new_z)
        self._h_cc[unit] = torch.eye(self._size)  # nothing but rounding is left of it, which has no inverse
        if used + self._size == len(self._u):
            self._settle()

    def _update_diagonal(self, u: Tensor, z: Tensor) -> None:
        n, m = len(self._left), self._size
        u_c, z_c = (one[:, : n * m].reshape(m, n, m).transpose(0, 1) for one in (u, z))
        self._h_cc[self._left] -= u_c.transpose(1, 2) @ u_c
        cross = u_c.transpose(1, 2) @ z_c
        self._g_cc[self._left] -= cross + cross.transpose(1, 2)

    def _settle(self) -> None:
        """Carry the delayed removals out, and leave the columns of what is gone behind."""
        stays = torch.ones(len(self._left), dtype=torch.bool)
        stays[self._delayed] = False
        columns = torch.ones(len(self._h), dtype=torch.bool)
        columns[: len(stays) * self._size] = stays.repeat_interleave(self._size)
        u, z = self._u[:, columns], self._z[:, columns]
        cross = u.T @ z
        self._h = self._h[columns][:, columns] - u.T @ u
        self._g = self._g[columns][:, columns] - cross - cross.T
        self._left = self._left[stays]
        self._start()


def reader(kernel_Dd: Tensor, covariance: Tensor | Sketch, columns_nm: Tensor, rest: Tensor) -> Reader | WideReader:
    """Return the reader for a covariance of this kind."""
    kind = WideReader if isinstance(covariance, Sketch) else Reader
    return kind(kernel_Dd, covariance, columns_nm, rest)  # type: ignore[arg-type]


def remaining(readers: Sequence[Reader | WideReader], units: int, kept: int) -> Tensor:
    """Return the numbers, in order, of the units that are left when the cheapest for all readers together has been
    removed until `kept` are; of several that cost the same the first goes."""
    alive = torch.ones(units, dtype=torch.bool)
    for _ in range(units - kept):
        costs = torch.stack([reader.costs() for reader in readers]).sum(0)
        unit = int(costs.masked_fill(~alive, float("inf")).argmin())
        alive[unit] = False
        for reader in readers:
            reader.remove(unit)
    return alive.nonzero().flatten()


def repaired(kernel_Dd: Tensor, covariance: Tensor | Sketch, columns: Tensor) -> Tensor:
    """Return the kernel (D, d) that has only these columns, the others zero, and whose outputs differ least."""
    if isinstance(covariance, Sketch):
        return repaired_wide(kernel_Dd, covariance, columns)
    left = covariance[columns]
    factor = torch.linalg.cholesky(left[:, columns])
    kernel = torch.zeros_like(kernel_Dd)
    kernel[:, columns] = torch.cholesky_solve(left @ kernel_Dd.T, factor).T
    return kernel
