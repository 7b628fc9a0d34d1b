"""VGG (Simonyan and Zisserman 2015, arXiv:1409.1556) for 32-pixel images. Knows nothing of weights."""

from __future__ import annotations

from torch import Tensor, nn

# Output channels of each convolution; "M" is a 2x2 max pool. A name with _bn has batch norms.
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
LAYERS: dict[str, tuple[int | str, ...]] = {"cifar_vgg16": _VGG16, "cifar_vgg16_bn": _VGG16}


class CifarVGG(nn.Module):
    """A VGG whose five max pools bring 32 pixels to one, so that a single linear layer ends it.

    The names in `features` are torchvision's, so that its published weights fit all but the last layer.
    """

    def __init__(
        self, *, layers: tuple[int | str, ...], batch_norm: bool, num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = in_channels
        for layer in layers:
            if isinstance(layer, str):
                modules.append(nn.MaxPool2d(2))
                continue
            modules.append(nn.Conv2d(channels, layer, 3, padding=1))
            if batch_norm:
                modules.append(nn.BatchNorm2d(layer))
            modules.append(nn.ReLU(inplace=True))
            channels = layer
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images of 32 x 32."""
        return self.classifier(self.features(x_BCHW).flatten(1))  # type: ignore[no-any-return]


def cifar_vgg(name: str, *, num_classes: int, in_channels: int = 3) -> CifarVGG:
    """Return the freshly initialised network called `name`, a key of LAYERS."""
    batch_norm = name.endswith("_bn")
    return CifarVGG(layers=LAYERS[name], batch_norm=batch_norm, num_classes=num_classes, in_channels=in_channels)


def _initialise(module: nn.Module) -> None:
    """Draw convolutions and linear layers as He et al. 2015 (arXiv:1502.01852) do, with all biases zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
