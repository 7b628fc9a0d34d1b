"""Every family of networks cuts at every granularity, and its blocks together are bitwise the network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from distill.blocks.cut import Chain, Granularity, cut
from distill.teachers import build_architecture
from tests.matrix import matrix


def _torchvision(name: str, **options: object) -> nn.Module:
    return build_architecture(source="torchvision", name=name, num_classes=7, options=options)


def _vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, cfgs, make_layers

    with torch.device("meta"):  # the real head has 120 million weights
        network = VGG(make_layers(cfgs["A"], batch_norm=True), num_classes=7, init_weights=False)
    network.classifier = nn.Sequential(nn.Linear(25088, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 7))
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


def _resnext() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [2, 1, 1, 1], num_classes=7, groups=4, width_per_group=8)


def _regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    shape = BlockParams.from_init_params(depth=6, w_0=24, w_a=24.0, w_m=2.5, group_width=8, se_ratio=0.25)
    return RegNet(shape, num_classes=7)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=7
    )


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=7)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=7)


def _efficientnet_v2() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    setting = [
        FusedMBConvConfig(1, 3, 1, 16, 16, 2),
        FusedMBConvConfig(4, 3, 2, 16, 24, 2),
        MBConvConfig(4, 3, 2, 24, 32, 2),
    ]
    return EfficientNet(setting, dropout=0.2, num_classes=7)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {  # how to build one, and its image size
    "cifar_resnet": (partial(build_architecture, source="cifar", name="cifar_resnet20", num_classes=7), 32),
    "cifar_vgg": (partial(build_architecture, source="cifar", name="cifar_vgg16_bn", num_classes=7), 32),
    "resnet": (partial(_torchvision, "resnet18"), 32),
    "resnext": (_resnext, 32),
    "vgg": (_vgg, 32),
    "mobilenet_v2": (partial(_torchvision, "mobilenet_v2", width_mult=0.25), 32),
    "mobilenet_v3": (partial(_torchvision, "mobilenet_v3_small", width_mult=0.5), 32),
    "efficientnet": (partial(_torchvision, "efficientnet_b0"), 32),
    "efficientnet_v2": (_efficientnet_v2, 32),
    "densenet": (_densenet, 32),
    "convnext": (_convnext, 32),
    "regnet": (_regnet, 32),
    "googlenet": (partial(_torchvision, "googlenet", init_weights=False), 32),
    "vit": (_vit, 32),
}


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    build, size = FAMILIES[request.param]
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that forgetting a norm shows
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model, size


@pytest.mark.parametrize("granularity", matrix([Granularity.residual, Granularity.conv, Granularity.resolution]))
def test_blocks_together_are_bitwise_the_network(network: tuple[nn.Module, int], granularity: Granularity) -> None:
    model, size = network
    sample = torch.randn(2, 3, size, size)
    chain = cut(model, sample, granularity=granularity)
    boundaries = chain.run(sample, last=len(chain.blocks), keep=range(len(chain.blocks) + 1))
    assert torch.equal(boundaries[len(chain.blocks)], model(sample))
    assert len(chain.blocks) > 2
    assert len({block.name for block in chain.blocks}) == len(chain.blocks)
    for index in range(len(chain.blocks)):
        expected = boundaries[index + 1]
        assert expected.stride() == chain.boundaries[index + 1].stride
        assert torch.equal(chain.run_block(index, boundaries[index]), expected)
        if granularity is Granularity.residual:  # the others differ only in where they cut
            with torch.no_grad():
                assert torch.equal(chain.block_module(index).eval()(boundaries[index]), expected)
    _check_partition(model, chain, modules_too=granularity is Granularity.residual)


def _check_partition(model: nn.Module, chain: Chain, *, modules_too: bool) -> None:
    """Every convolution, and every weight by its own name, lies in exactly one block."""
    convolutions = [path for block in chain.blocks for path in block.convolutions]
    assert sorted(convolutions) == sorted(p for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if modules_too:
        keys = [key for index in range(len(chain.blocks)) for key in chain.block_module(index).state_dict()]
        assert sorted(keys) == sorted(model.state_dict())
