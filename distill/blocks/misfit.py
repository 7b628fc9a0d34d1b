"""Which layer cannot take what it is given, where a network fails on images: their size is not always to blame."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from distill.errors import ConfigError


@torch.no_grad()
def channel_misfit(model: nn.Module, sample: Tensor) -> ConfigError | None:
    """Return the error on teacher that a convolution for other channels deserves, if that is why `model` fails."""
    met: list[tuple[str, int, int]] = []

    def meet(name: str, conv: nn.Conv2d, images: Tensor) -> None:
        if images.dim() == 4 and images.shape[1] != conv.in_channels:
            met.append((name, conv.in_channels, images.shape[1]))

    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    hooks = [
        conv.register_forward_pre_hook(lambda conv, inputs, name=name: meet(name, conv, inputs[0]))
        for name, conv in convolutions
    ]
    with suppress(Exception):  # whatever it says has been said
        model(sample)
    for hook in hooks:
        hook.remove()
    if not met:
        return None
    name, takes, gets = met[0]
    allowed = (
        f"a network for images of {sample.shape[1]} channels, which grey pictures are given too; its {name} takes "
        f"{takes} and is given {gets}: teacher.options.in_chans={sample.shape[1]} where it is timm's, or a factory "
        "that wraps it"
    )
    return ConfigError("teacher", f"{takes} channel{'s' * (takes != 1)}", allowed)
