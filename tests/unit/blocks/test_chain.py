"""Where a chain cuts, how it names its blocks, and what it promises about the boundaries it hands out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.blocks.chain import Boundary
from distill.blocks.cut import Chain, Granularity, HookedChain, cut
from distill.errors import ConfigError
from distill.teachers import build_architecture


def _cifar(name: str) -> nn.Module:
    return build_architecture(source="cifar", name=name, num_classes=10)


def _images(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _names(chain: Chain) -> list[str]:
    return [block.name for block in chain.blocks]


def _all(chain: Chain, x: Tensor) -> list[Tensor]:
    kept = chain.run(x, last=len(chain.blocks), keep=range(len(chain.blocks) + 1))
    return [kept[boundary] for boundary in range(len(chain.blocks) + 1)]


def test_conv_gives_vgg_one_block_a_convolution_and_a_head() -> None:
    chain = cut(_cifar("cifar_vgg16_bn"), _images(), granularity=Granularity.conv)
    assert [len(block.convolutions) for block in chain.blocks] == [1] * 13 + [0]
    assert _names(chain)[0] == "features.0"
    assert chain.blocks[1].modules == ("features.3", "features.4")  # convolution and batch norm
    assert chain.boundaries[2].shape == (2, 64, 16, 16)  # the max pool went with its convolution
    assert _names(chain)[-1] == "classifier"


@pytest.mark.parametrize("granularity", [Granularity.conv, Granularity.residual])
def test_resnet_gives_a_stem_its_units_and_a_head(granularity: Granularity) -> None:
    chain = cut(_cifar("cifar_resnet20"), _images(), granularity=granularity)
    units = [f"layer{stage}.{unit}" for stage in (1, 2, 3) for unit in range(3)]
    assert _names(chain) == ["conv1", *units, "linear"]
    assert chain.blocks[1].convolutions == ("layer1.0.conv1", "layer1.0.conv2")


def test_resolution_joins_what_works_at_one_size() -> None:
    chain = cut(_cifar("cifar_resnet20"), _images(), granularity=Granularity.resolution)
    assert _names(chain) == ["conv1-layer1", "layer2", "layer3", "linear"]
    vgg = cut(_cifar("cifar_vgg16_bn"), _images(), granularity=Granularity.resolution)
    assert [len(block.convolutions) for block in vgg.blocks] == [2, 2, 3, 3, 3, 0]
    imagenet = build_architecture(source="torchvision", name="resnet18", num_classes=10)
    chain = cut(imagenet, _images(), granularity=Granularity.resolution)
    assert _names(chain) == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]


def test_residual_keeps_units_whole_even_without_their_skip() -> None:
    model = build_architecture(source="torchvision", name="mobilenet_v3_small", num_classes=10)
    chain = cut(model, _images(), granularity=Granularity.residual)
    assert [len(block.convolutions) for block in chain.blocks] == [1, 4, 3, 3, *[5] * 8, 1, 0]
    assert len(cut(model, _images(), granularity=Granularity.conv).blocks) > len(chain.blocks)


def test_squeeze_excitation_does_not_hide_the_resolution() -> None:
    chain = cut(_Gated(), _images(), granularity=Granularity.resolution)
    assert len(chain.blocks) == 2


class _Gated(nn.Module):
    """Two convolutions, each scaled by a gate computed from its mean; the gate's convolutions see one pixel."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), self.Gate(), nn.Conv2d(4, 4, 3, padding=1), self.Gate())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 3, 1)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).relu()).relu()


def test_shared_weights_stay_in_one_block() -> None:
    chain = cut(_Shared(), _images(4), granularity=Granularity.conv)
    assert [block.convolutions for block in chain.blocks] == [("first", "second", "last")]
    student = chain.block_module(0)
    assert student.get_parameter("first.weight") is student.get_parameter("last.weight")
    with pytest.raises(ConfigError, match="weights are shared"):
        cut(_Shared(), _images(4), granularity=Granularity.modules, modules=["second"])


class _InPlace(nn.Module):
    """Overwrites tensors in every way there is; the skip reads what the activation has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.activation = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("shift", torch.tensor(0.5), persistent=False)
        self.scale = torch.tensor(2.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv1(x)
        y = self.conv2(self.activation(x))
        y.mul_(self.scale).sub_(self.shift)
        y += x
        y = torch.relu_(self.conv3(F.relu(y, True)))
        torch._assert(x.shape[1] == 8, "eight channels")
        if mask is not None:
            y = y * mask
        return self.fc(y.mean((2, 3)))


def test_kept_boundaries_survive_in_place_operations() -> None:
    model, sample = _InPlace(), _images(8)
    chain = cut(model, sample, granularity=Granularity.conv)
    assert _names(chain) == ["conv1", "conv2", "conv3", "fc"]
    boundaries = _all(chain, sample)
    assert torch.equal(boundaries[-1], model(sample))
    assert [tensor._version for tensor in boundaries] == [sample._version, 0, 0, 0, 0]
    for index, before in enumerate(boundaries[:-1]):
        assert torch.equal(chain.run_block(index, before), boundaries[index + 1])
    assert model.activation.inplace  # the caller's own modules are left alone
    keys = [key for index in range(4) for key in chain.block_module(index).state_dict()]
    assert sorted(keys) == sorted(model.state_dict())  # neither the unsaved buffer nor the plain tensor


def test_run_stops_at_the_last_boundary_asked_for() -> None:
    model = _cifar("cifar_resnet20")
    chain = cut(model, _images(), granularity=Granularity.resolution)
    ran: list[str] = []
    for path in ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"):
        hooked = chain._modules[int(path[5]) - 1].get_submodule(path)  # type: ignore[attr-defined]
        hooked.register_forward_hook(lambda *_, path=path: ran.append(path))
    kept = chain.run(_images(), last=2, keep=[0, 2])
    assert sorted(kept) == [0, 2]
    assert ran == ["layer1.0.conv1", "layer2.0.conv1"]
    assert chain.run(_images(), last=0, keep=[0])[0].shape == (2, 3, 32, 32)


def test_boundaries_have_the_recorded_strides_whatever_comes_in() -> None:
    sample = _images().to(memory_format=torch.channels_last)
    chain = cut(_cifar("cifar_resnet20"), sample, granularity=Granularity.resolution)
    expected = _all(chain, sample)
    assert expected[1].is_contiguous(memory_format=torch.channels_last)
    for boundary, form, tensor in zip(_all(chain, sample.contiguous()), chain.boundaries, expected, strict=True):
        assert (tuple(boundary.shape), boundary.stride(), boundary.dtype) == (form.shape, form.stride, form.dtype)
        assert torch.equal(boundary, tensor)
    few = _all(chain, _images(batch=5)[:1])
    assert few[1].shape == (1, 16, 32, 32)
    assert few[1].stride() == expected[1].stride()


def test_a_boundary_without_density_is_recorded_dense() -> None:
    tokens = torch.zeros(2, 5, 7)
    assert Boundary.of(tokens[:, 0]) == Boundary((2, 7), (7, 1), torch.float32)
    turned = Boundary.of(tokens.transpose(0, 1))
    assert turned.stride == (7, 35, 1)
    assert turned.conform(torch.zeros(5, 4, 7)).stride() == (7, 35, 1)
    assert (turned.numel, turned.nbytes) == (70, 280)


def test_a_block_module_is_a_trainable_copy() -> None:
    model = _cifar("cifar_resnet20")
    chain = cut(model, _images(), granularity=Granularity.residual)
    block = chain.block_module(4)
    assert block.training
    assert all(parameter.requires_grad for parameter in block.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert isinstance(block.get_submodule("layer2.0.conv1"), nn.Conv2d)
    block.set_submodule("layer2.0.conv1", nn.Conv2d(16, 32, 1, stride=2))
    x = torch.randn(2, 16, 32, 32)
    block(x).sum().backward()
    assert block.get_parameter("layer2.0.conv1.weight").grad is not None
    before = chain.run_block(4, x)
    with torch.no_grad():
        block.get_parameter("layer2.0.conv2.weight").zero_()
    assert torch.equal(chain.run_block(4, x), before)


def test_listed_modules_become_blocks_and_so_does_the_rest() -> None:
    model = _cifar("cifar_resnet20")
    chain = cut(model, _images(), granularity=Granularity.modules, modules=["layer1", "layer2.1"])
    assert _names(chain) == ["before layer1", "layer1", "before layer2.1", "layer2.1", "after layer2.1"]
    assert torch.equal(_all(chain, _images())[-1], model(_images()))
    assert len(chain.blocks[1].convolutions) == 6


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["layr1"], "layr1.*layer1"),
        (["layer1", "layer1.0"], "lies inside layer1"),
        (["layer1", "layer1"], "twice"),
        (["layer2", "layer1"], "order in which they run"),
        (["layr*.conv2"], r"layr\*.*a pattern that matches"),
        (["layer1.*.conv2", "layer1.0.*2"], "twice"),
        (["layer2.*.conv2", "layer1.*.conv2"], "order in which they run"),
        ([], "list of module paths"),
    ],
)
def test_a_list_that_cannot_be_cut_says_why(modules: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        cut(_cifar("cifar_resnet20"), _images(), granularity=Granularity.modules, modules=modules)
    assert caught.value.setting == "blocks.modules"


def test_images_of_a_wrong_size_are_the_users_error() -> None:
    with pytest.raises(ConfigError, match="Output size is too small") as caught:
        cut(_cifar("cifar_vgg16_bn"), _images(16), granularity=Granularity.conv)
    assert caught.value.setting == "data.image_size"


class _Dynamic(nn.Module):
    """Branches on its data, so torch.fx cannot trace it."""

    def __init__(self, *, overwrite: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        self.body, self.unused, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.pair = nn.Bilinear(8, 8, 8)
        self.overwrite = overwrite
        self.ran = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 0:
            x = x + 1
        y = self.body(x)
        if self.overwrite:
            y += x
        y = y.mean((2, 3))
        self.ran += 1
        return self.fc(self.pair(y, y))


def test_an_untraceable_network_asks_for_a_list() -> None:
    with pytest.raises(ConfigError, match=r"control flow.*blocks\.modules=") as caught:
        cut(_Dynamic(), _images(8), granularity=Granularity.residual)
    assert caught.value.setting == "blocks.granularity"


def test_an_untraceable_network_is_heard_at_its_listed_modules() -> None:
    model, sample = _Dynamic(), _images(8)
    chain = cut(model, sample, granularity=Granularity.modules, modules=["stem", "body", "fc"])
    assert isinstance(chain, HookedChain)
    assert _names(chain) == ["stem", "before body", "body", "before fc", "fc"]
    assert [block.convolutions for block in chain.blocks] == [("stem.0",), (), ("body",), (), ()]
    boundaries = _all(chain, sample)
    assert torch.equal(boundaries[-1], model(sample))
    assert [tuple(tensor.shape) for tensor in boundaries] == [form.shape for form in chain.boundaries]
    for index in (0, 2, 4):
        assert torch.equal(chain.run_block(index, boundaries[index]), boundaries[index + 1])
        with torch.no_grad():
            assert torch.equal(chain.block_module(index).eval()(boundaries[index]), boundaries[index + 1])
    assert list(chain.block_module(0).state_dict()) == ["stem.0.weight", "stem.0.bias"]
    assert all(parameter.requires_grad for parameter in chain.block_module(0).parameters())
    with pytest.raises(NotImplementedError, match="between listed modules"):
        chain.run_block(1, boundaries[1])


def test_a_hooked_chain_runs_no_deeper_than_asked() -> None:
    chain = cut(_Dynamic(), _images(8), granularity=Granularity.modules, modules=["stem", "body", "fc"])
    root = chain._root  # type: ignore[attr-defined]
    before = root.ran
    assert sorted(chain.run(_images(8), last=3, keep=[1, 3])) == [1, 3]
    assert root.ran == before


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["stem", "unused"], "unused.*that the network runs"),
        (["body", "stem"], "order in which they run"),
        (["pair"], "2 values enter"),
        (["stem", "nothing"], "nothing.*path of a module"),
    ],
)
def test_a_list_that_cannot_be_hooked_says_why(modules: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cut(_Dynamic(), _images(8), granularity=Granularity.modules, modules=modules)


def test_a_hooked_boundary_that_is_overwritten_later_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'body'.*not changed in place"):
        cut(_Dynamic(overwrite=True), _images(8), granularity=Granularity.modules, modules=["body"])
