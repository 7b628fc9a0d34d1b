"""How a unit's weights change: its options, its optimizer, its learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What a step moves of a layer's first weights, with budgets of so many steps or more: benchmarks/rates.py.
RELATIVE_RATE, LONG_BUDGET = 1 / 32, 200
FIXED_RATE = 3e-3  # where weights have no size to go by, or do not say how far a step moves them


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How every block is trained; the meanings are those of the section `distill` of the configuration."""

    loss: str = "normalized_mse"
    optimizer: str = "adam"
    lr: float | None = None  # None: of every layer by its first weights (see peak_rates)
    momentum: float = 0.9
    smoothing: float = 0.99
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    clip_norm: float | None = None
    amp: str = "off"
    patience: int = 0  # looks without improvement after which a block stops; 0: only at its budget
    min_delta: float = 0.0
    log_every: int = 20


def learning_rate(step: int, *, peak: float, budget: int, options: TrainerOptions) -> float:
    """Return the rate of step `step` (0-based): linear warm-up, then constant or half a cosine from the peak to zero.

    Source of the cosine: Loshchilov, Hutter 2017, "SGDR", equation 5, without restarts (arXiv:1608.03983).
    """
    if step < options.warmup_steps:
        return peak * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return peak
    share = (step - options.warmup_steps) / max(1, budget - options.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def peak_rates(module: nn.Module, *, budget: int, options: TrainerOptions) -> dict[float, list[nn.Parameter]]:
    """Return the parameters that train by their peak rate; the rate with the most weights comes first.

    An explicit rate is everyone's. Else it follows from the layer's first weights, since Adam moves every weight by
    about the rate, whatever its size: it shall move each by the same share of what it is, so that what a good start
    knows is changed alike in all layers, and wiped out in none. Adam's first steps follow the noise of single batches
    at full length; few steps cannot repair that, so the share grows with the root of the budget. A warm-up was of no
    use, since it moves the peak to where too few steps follow it.
    Source: Shazeer, Stern 2018, "Adafactor", section 8: the step size is RMS(weights) times a relative one
    (arXiv:1804.04235). We differ: the weights are the first ones, hence nothing of it is in a checkpoint; a layer's
    tensors have one rate, so that a bias of zeros moves as its layer does; and RMS is rounded to a power of two,
    which makes few groups of tensors and the same ones where sums round otherwise.
    """
    share = RELATIVE_RATE * min(1.0, math.sqrt(budget / LONG_BUDGET))
    trained = {parameter: None for parameter in module.parameters() if parameter.requires_grad}
    if options.lr is not None or options.optimizer != "adam":
        return {FIXED_RATE if options.lr is None else options.lr: list(trained)}
    found: dict[float, list[nn.Parameter]] = {}
    for layer in module.modules():
        own = [parameter for parameter in layer.parameters(recurse=False) if parameter in trained]
        if own:
            found.setdefault(_rate(own, share), []).extend(own)
            for parameter in own:
                del trained[parameter]
    return dict(sorted(found.items(), key=lambda one: -sum(parameter.numel() for parameter in one[1])))


def _rate(layer: list[nn.Parameter], share: float) -> float:
    """Return the rate of a layer's tensors, by the one with the largest weights: in a batch norm mostly its factors."""
    size = max(float(parameter.detach().double().square().mean().sqrt()) for parameter in layer)
    return share * 2.0 ** round(math.log2(size)) if 0 < size < math.inf else FIXED_RATE


def make_optimizer(
    module: nn.Module, *, budget: int, options: TrainerOptions, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer of a block, with PyTorch's fused update where it has one; its groups of parameters are those
    of peak_rates. On CUDA a learning rate lies on the device, where a captured update reads it."""
    on_device = device.type == "cuda"
    groups = [
        {"params": parameters, "peak": peak, "lr": torch.tensor(peak, device=device) if on_device else peak}
        for peak, parameters in peak_rates(module, budget=budget, options=options).items()
    ]
    if options.optimizer == "adam":
        return torch.optim.Adam(groups, weight_decay=options.weight_decay, fused=True)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=options.momentum, weight_decay=options.weight_decay, fused=True)
    optimizer = torch.optim.RMSprop(
        groups,
        alpha=options.smoothing,
        weight_decay=options.weight_decay,
        capturable=on_device,  # from the start: else it counts its steps on the CPU, where no graph can
    )
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are, by intent
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, step: int, *, budget: int, options: TrainerOptions) -> float:
    """Give every group its rate of step `step`; return that of the most weights, which is the one to show."""
    rates = [
        learning_rate(step, peak=group["peak"], budget=budget, options=options) for group in optimizer.param_groups
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            # In place: a captured update reads the tensor that was there at the capture.
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return rates[0]
