"""First weights that lose least of what a layer gives on the data, in closed form or by a smooth minimisation.

A layer's output is W u for its unfolded inputs u. Another kernel W' in its place is off by (W - W') u, of which the
next layer sees what the batch norm behind lets through, S = diag(s), s = gamma / sqrt(variance + eps). With the mean
put right, the expected squared error is tr(S (W - W') Sigma (W - W')^T S), Sigma being the covariance of u. Everything
is float64 on the CPU, so that every rank gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.profiling.sketch import Sketch
from distill.profiling.statistics import InputStatistics

DAMPING = 1e-4  # of the mean variance: directions that few batches have shown are not taken for empty ones
MOST_WORK = 4e10  # multiplications of one minimisation: a second or two; wide layers get fewer steps, or none
TINY = 1e-12  # relative: below it a factor is rounding, and a variance is none
LEAST_SCALE = 1e-3  # of the largest: a channel that the batch norm has switched off still has to have some weight


@dataclass(frozen=True)
class Flow:
    """What is known of one layer: `mean` (d) and damped `covariance` (d, d) of the rows that it sees, and the `scale`
    (D) at which its outputs count."""

    mean: Tensor
    covariance: Tensor | Sketch
    scale: Tensor

    @classmethod
    def of(cls, statistics: InputStatistics, kernel: Tensor, norm: nn.Module | None) -> Flow:
        """Return what is known of the layer with the weight `kernel` (D, ...), with `norm` or nothing behind it."""
        covariance = raised(statistics.covariance, DAMPING * mean_variance(statistics.covariance))
        ones = torch.ones(len(kernel), dtype=torch.float64)
        return cls(statistics.mean, covariance, ones if norm is None else scale_of(norm))

    def error(self, difference: Tensor) -> Tensor:
        """Return the expected squared error of outputs whose kernel is off by `difference` (D, d)."""
        scaled = self.scale[:, None] * difference
        return ((scaled @ self.covariance) * scaled).sum()


def mean_variance(covariance: Tensor | Sketch) -> Tensor:
    """Return the mean of a covariance's diagonal."""
    return (covariance.variances if isinstance(covariance, Sketch) else covariance.diagonal()).mean()


def raised(covariance: Tensor | Sketch, variance: Tensor) -> Tensor | Sketch:
    """Return a covariance with so much variance more in every direction."""
    if isinstance(covariance, Sketch):
        return covariance.raised(variance)
    covariance = covariance.clone()
    covariance.diagonal().add_(variance)
    return covariance


def matrix(kernel: Tensor) -> Tensor:
    """Return a layer's weight as (D, d), float64 on the CPU."""
    return kernel.detach().cpu().double().flatten(1)


def norm_of(network: nn.Module, statistics: InputStatistics) -> nn.Module | None:
    """Return the batch norm behind a layer, if the network (or the block) has it, and it has statistics and weights."""
    norm = dict(network.named_modules()).get(statistics.norm or "")
    known = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None and norm.affine
    return norm if known else None


def scale_of(norm: nn.Module) -> Tensor:
    """Return a batch norm's gamma / sqrt(variance + eps) in eval mode; never quite 0."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_var is not None
    scale = norm.weight.detach().cpu().double() / (norm.running_var.cpu().double() + norm.eps).sqrt()
    least = LEAST_SCALE * scale.abs().max().clamp_min(torch.finfo(scale.dtype).tiny)
    return torch.where(scale.abs() < least, torch.where(scale < 0, -least, least), scale)


@torch.no_grad()
def rebase(norm: nn.Module, flow: Flow, before: Tensor, after: Tensor, bias: Tensor | None = None) -> None:
    """Give the batch norm behind a layer the statistics of the layer's new kernel, and keep the function's mean and
    scale: m' = W' mu + b, v' = diag(W' Sigma W'^T), gamma' = s sqrt(v' + eps), beta' = beta + s (W mu + b - m), so that
    they also last where the statistics are estimated anew. Kernels are (D, d); `bias` is the layer's b (D)."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    variance = ((after @ flow.covariance) * after).sum(1)
    offset = 0.0 if bias is None else bias.detach().cpu().double()
    shift = flow.scale * (before @ flow.mean + offset - norm.running_mean.cpu().double())
    norm.bias.copy_(norm.bias.cpu().double() + shift)
    norm.weight.copy_(flow.scale * (variance + norm.eps).sqrt())
    norm.running_mean.copy_(after @ flow.mean + offset)
    norm.running_var.copy_(variance)


@torch.no_grad()
def keep_mean(layer: nn.Module, flow: Flow, before: Tensor, after: Tensor) -> None:
    """Change the bias that a replacement ends with, if there is one, so that its outputs keep their mean."""
    *_, last = (part for part in layer.modules() if isinstance(part, nn.Conv2d | nn.Linear))
    if last.bias is not None:
        last.bias.copy_(last.bias.cpu().double() + (before - after) @ flow.mean)


def regressed(kernel: Tensor, features: Tensor, flow: Flow) -> Tensor:
    """Return the weight (D, m) that loses least of `kernel` W (D, d) where a layer sees m features Q^T u of the rows u,
    `features` being Q (d, m): W Sigma Q (Q^T Sigma Q)^-1, whatever the outputs' scale."""
    seen = flow.covariance @ features
    gram = features.T @ seen
    least = (TINY * gram.diagonal().mean()).clamp_min(torch.finfo(gram.dtype).tiny)  # a feature may be empty
    gram.diagonal().add_(least)
    weight: Tensor = torch.linalg.solve(gram, seen.T @ kernel.T).T
    return weight


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product with the columns of the left as long as the rows of the right, where neither is none."""
    columns, rows = left.norm(dim=0), right.norm(dim=1)
    exist = (columns > TINY * columns.max()) & (rows > TINY * rows.max())
    factor = torch.where(exist, (rows / columns).sqrt(), torch.ones_like(rows))
    return left * factor, right / factor[:, None]


def iterations_for(kernel: Tensor) -> int:
    """Return the steps of a minimisation that a layer with a weight of this form (D, d) can have."""
    rows, width = kernel.shape
    return min(60, int(MOST_WORK / (4 * rows * width**2)))


def minimised(
    factors: Sequence[Tensor], kernel_of: Callable[..., Tensor], kernel: Tensor, flow: Flow, *, iterations: int
) -> list[Tensor]:
    """Return the factors, by L-BFGS from those given, whose kernel_of(*factors) (D, d) loses least of `kernel`; those
    given where that is no better.

    Source of the method: Liu, Nocedal 1989, "On the limited memory BFGS method for large scale optimization".
    """
    # In the usual order of memory, which L-BFGS relies on: weights may lie channels last.
    start = [factor.detach().double().clone(memory_format=torch.contiguous_format) for factor in factors]
    if iterations == 0:
        return start
    scale = flow.error(kernel).clamp_min(torch.finfo(torch.float64).tiny)

    def loss(factors: Sequence[Tensor]) -> Tensor:
        return flow.error(kernel - kernel_of(*factors)) / scale

    free = [factor.clone().requires_grad_() for factor in start]
    optimizer = torch.optim.LBFGS(
        free,
        max_iter=iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-10,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss(free)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    ended = [factor.detach() for factor in free]
    with torch.no_grad():
        return ended if loss(ended) < loss(start) else start
