"""Building a teacher by source and name, and what is said when that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.errors import ConfigError
from distill.teachers import build_architecture


class Small(nn.Linear):
    """A factory for the tests below; a class is a callable too."""

    def __init__(self, *, num_classes: int, width: int = 3) -> None:
        super().__init__(width, num_classes)


def without_classes(*, width: int) -> nn.Module:
    return nn.Linear(width, 2)


def not_a_module(num_classes: int) -> int:
    return num_classes


def broken(num_classes: int) -> nn.Module:
    raise TypeError(f"broken inside for {num_classes}")


# He et al. 2016, table 6, in millions; exactly as listed with the weights released by Yerlan Idelbayev.
@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_cifar_resnets_have_the_published_size(depth: int, parameters: int) -> None:
    model = build_architecture(source="cifar", name=f"cifar_resnet{depth}", num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_cifar_resnet_has_the_names_of_published_weights() -> None:
    model = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    keys = list(model.state_dict())
    assert keys[0] == "conv1.weight"
    assert "layer3.2.bn2.running_mean" in keys
    assert keys[-2:] == ["linear.weight", "linear.bias"]
    assert not [key for key in keys if "shortcut" in key]


def test_option_a_shortcut_skips_pixels_and_pads_channels() -> None:
    model = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    x_BCHW = torch.randn(1, 16, 4, 4)
    out_BCHW = model.get_submodule("layer2.0.shortcut")(x_BCHW)
    assert torch.equal(out_BCHW[:, 8:24], x_BCHW[:, :, ::2, ::2])
    assert not out_BCHW[:, :8].any()
    assert not out_BCHW[:, 24:].any()


@pytest.mark.parametrize(("name", "norms"), [("cifar_vgg16", 0), ("cifar_vgg16_bn", 13)])
def test_cifar_vgg_is_thirteen_convolutions_and_one_linear_layer(name: str, norms: int) -> None:
    model = build_architecture(source="cifar", name=name, num_classes=10, options={"in_channels": 1})
    kinds = [type(module) for module in model.modules()]
    assert [kinds.count(kind) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear)] == [13, norms, 5, 1]
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_torchvisions_weights_fit_all_of_cifar_vgg_but_its_last_layer(name: str) -> None:
    with torch.device("meta"):
        published = build_architecture(source="torchvision", name=name, num_classes=1000).state_dict()
        own = build_architecture(source="cifar", name=f"cifar_{name}", num_classes=10).state_dict()
    fitting = [key for key, value in own.items() if key in published and published[key].shape == value.shape]
    assert [key for key in own if key not in fitting] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "inception_v3"])
def test_torchvision_builds_quietly_with_one_output(name: str) -> None:
    with torch.device("meta"):  # no initialisation: it takes seconds
        model = build_architecture(source="torchvision", name=name, num_classes=5, options=_fast(name))
        logits = model.train()(torch.zeros(2, 3, 96, 96))
    assert logits.shape == (2, 5)


def _fast(name: str) -> dict[str, object]:
    return {} if name == "resnet18" else {"init_weights": False}


def test_timm_builds_without_downloading() -> None:
    pytest.importorskip("timm")
    model = build_architecture(source="timm", name="convnext_atto", num_classes=5)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(ConfigError, match="convnext_atto"):
        build_architecture(source="timm", name="convnext_atta", num_classes=5)


def test_timm_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[timm\]'"):
        build_architecture(source="timm", name="resnet18", num_classes=5)


@pytest.mark.parametrize(
    ("source", "name", "setting", "words"),
    [
        ("torchvison", "resnet18", "teacher.source", "'torchvision' .the nearest"),
        ("torchvision", "resnet81", "teacher.name", "'resnet18' .the nearest"),
        ("cifar", "cifar_resnet21", "teacher.name", "one of cifar_resnet20"),
    ],
)
def test_an_unknown_source_or_name_is_answered_with_the_nearest(
    source: str, name: str, setting: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_architecture(source=source, name=name, num_classes=10)
    assert caught.value.setting == setting


def test_an_option_the_architecture_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="widht") as caught:
        build_architecture(source="cifar", name="cifar_resnet20", num_classes=10, options={"widht": 2})
    assert caught.value.setting == "teacher.options"


@pytest.mark.parametrize("options", [{"nonsense": 1}, {"weights": "DEFAULT"}])
def test_options_that_a_registry_refuses_deep_inside_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"teacher.options: got .* what the architecture takes \(\w+Error"):
        build_architecture(source="torchvision", name="resnet18", num_classes=10, options=options)


def test_a_module_that_fails_while_it_is_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_factory.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"teacher.factory: .*SyntaxError.*broken_factory.py"):
        build_architecture(source="factory", name="", num_classes=4, factory="broken_factory:net")


def _from_factory(function: str, **options: object) -> nn.Module:
    module = function if ":" in function or not function else f"{__name__}:{function}"
    return build_architecture(source="factory", name="", num_classes=4, factory=module, options=options)


def test_a_factory_gets_the_number_of_classes_if_it_takes_it() -> None:
    assert _from_factory("Small", width=2).get_parameter("weight").shape == (4, 2)
    assert _from_factory("without_classes", width=3).get_parameter("weight").shape == (2, 3)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("", "one colon"),
        ("no_such_package:f", "No module named 'no_such_package'"),
        ("Smal", "'Small' .the nearest"),
        ("not_a_module", "torch.nn.Module"),
        ("__name__", "can be called"),
    ],
)
def test_a_factory_that_cannot_be_used_says_why(function: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        _from_factory(function)
    assert caught.value.setting == "teacher.factory"


def test_an_error_inside_a_factory_keeps_its_own_words() -> None:
    with pytest.raises(TypeError, match="broken inside for 4"):
        _from_factory("broken")
