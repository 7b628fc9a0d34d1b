"""What goes along with the student as it is fine-tuned: from the settings of the section finetune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from distill.config.schema import FinetuneConfig
from distill.training.averaged import Averaged
from distill.training.companions import Companion
from distill.training.sparsity import Ramp, Sparsity


def companions_for(config: FinetuneConfig, student: nn.Module) -> list[Companion]:
    """Return them in the order in which they act: what makes weights zero last, so that means of weights over steps
    are made so too."""
    found: list[Companion] = []
    if config.ema is not None:
        found.append(Averaged(student, config.ema))
    if config.sparsity > 0:
        ramp = Ramp(config.sparsity, config.sparsity_begin, config.sparsity_end)
        found.append(Sparsity(student, ramp, config.sparsity_scope))
    return found


def in_words(epoch: Mapping[str, Any]) -> str:
    """Return the end of the line about an epoch with these facts."""
    return f", {100 * epoch['sparsity']:.1f} % of its weights are zero" if "sparsity" in epoch else ""


def facts_of(companions: Sequence[Companion]) -> dict[str, Any]:
    """Return what the record of an epoch is to say of them: where weights become zero, the share that is, and whether
    the student is `complete`, as it was asked for; only such a one may be kept."""
    return {
        name: value
        for one in companions
        if isinstance(one, Sparsity)
        for name, value in (("sparsity", one.share), ("complete", one.complete))
    }
