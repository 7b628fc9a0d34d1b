"""The CIFAR ResNets of He et al. 2016, section 4.2 (arXiv:1512.03385). Knows nothing of weights or configuration."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Residual units per stage; depth = 6 * units + 2.
UNITS_PER_STAGE = {
    "cifar_resnet20": 3,
    "cifar_resnet32": 5,
    "cifar_resnet44": 7,
    "cifar_resnet56": 9,
    "cifar_resnet110": 18,
}


class PaddedShortcut(nn.Module):
    """The parameter-free shortcut "option A": every second pixel, missing channels filled with zeros on both sides."""

    def __init__(self, *, in_channels: int, out_channels: int) -> None:
        super().__init__()
        missing = out_channels - in_channels
        self.padding = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, out_channels, H/2, W/2) for an input of (B, in_channels, H, W)."""
        return F.pad(x_BCHW[:, :, ::2, ::2], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input."""

    def __init__(self, *, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = PaddedShortcut(in_channels=in_channels, out_channels=out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, out_channels, H/stride, W/stride)."""
        out_BCHW = self.relu1(self.bn1(self.conv1(x_BCHW)))
        out_BCHW = self.bn2(self.conv2(out_BCHW))
        return self.relu2(out_BCHW + self.shortcut(x_BCHW))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """A ResNet for small images: one 3x3 convolution, three stages of 16, 32 and 64 channels, one linear layer."""

    def __init__(self, *, units: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(units, in_channels=16, out_channels=16, stride=1)
        self.layer2 = _stage(units, in_channels=16, out_channels=32, stride=2)
        self.layer3 = _stage(units, in_channels=32, out_channels=64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        self.apply(_initialise)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        out_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        out_BCHW = self.layer3(self.layer2(self.layer1(out_BCHW)))
        return self.linear(F.adaptive_avg_pool2d(out_BCHW, 1).flatten(1))  # type: ignore[no-any-return]


def cifar_resnet(name: str, *, num_classes: int, in_channels: int = 3) -> CifarResNet:
    """Return the freshly initialised network called `name`, a key of UNITS_PER_STAGE."""
    return CifarResNet(units=UNITS_PER_STAGE[name], num_classes=num_classes, in_channels=in_channels)


def _stage(units: int, *, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels=in_channels, out_channels=out_channels, stride=stride)
    rest = [BasicBlock(in_channels=out_channels, out_channels=out_channels, stride=1) for _ in range(units - 1)]
    return nn.Sequential(first, *rest)


def _initialise(module: nn.Module) -> None:
    """Draw convolutions and linear layers as He et al. 2015 (arXiv:1502.01852) do; biases of linear layers are zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
