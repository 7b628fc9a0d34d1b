"""Small networks whose blocks are timed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.norm(self.first(x))))  # type: ignore[no-any-return]


class Network(nn.Module):
    """A stem, blocks of these widths inside, and a head: blocks stem, body.0, ... and head."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(*(Block(width) for width in widths))
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).mean(dim=(2, 3)))  # type: ignore[no-any-return]
