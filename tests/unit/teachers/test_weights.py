"""Reading weights from files and by name, and what is said when they do not fit."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.config.compose import compose
from distill.errors import ConfigError
from distill.job.teacher import architecture_of, build_teacher
from distill.student.files import StudentCard, load_student, save_student
from distill.teachers import (
    build_architecture,
    load_backbone,
    load_teacher_weights,
    load_weights,
    options_for_weights,
    pretrained_weights,
)


def _network(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, num_classes))


def _same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def _refusal(model: nn.Module, weights: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_weights(model, weights)
    assert caught.value.setting == "teacher.weights"
    assert weights in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_torch_file_is_read_through_wrapping_and_prefixes(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = _network().state_dict()
    named = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({wrapper: named, "epoch": 3} if wrapper else named, tmp_path / "teacher.th")
    model = _network()
    assert not _same(model, state)
    load_weights(model, str(tmp_path / "teacher.th"))
    assert _same(model, state)


def test_a_safetensors_file_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = _network().state_dict()
    save_file(state, tmp_path / "teacher.safetensors")
    model = _network()
    load_teacher_weights(model, "torchvision", "resnet18", str(tmp_path / "teacher.safetensors"))
    assert _same(model, state)


def test_a_prefix_that_the_network_has_itself_is_kept(tmp_path: Path) -> None:
    wrapped = nn.ModuleDict({"module": _network()})
    state = wrapped.state_dict()
    torch.save(state, tmp_path / "teacher.pt")
    model = nn.ModuleDict({"module": _network()})
    load_weights(model, str(tmp_path / "teacher.pt"))
    assert _same(model, state)


def test_counters_missing_from_old_files_are_no_mismatch(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in _network().state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    model = _network()
    load_weights(model, str(tmp_path / "old.pth"))
    assert _same(model, model.state_dict() | state)


def test_a_mismatch_counts_and_names_the_first_of_each_kind(tmp_path: Path) -> None:
    state = _network().state_dict()
    state["extra"] = state.pop("0.bias")
    state["0.weight"] = torch.zeros(4, 3, 2, 2)
    torch.save(state, tmp_path / "other.pt")
    message = _refusal(_network(), str(tmp_path / "other.pt"))
    assert "1 of 9 missing (first: 0.bias)" in message
    assert "1 of 9 unexpected (first: extra)" in message
    assert "1 of another shape (first: 0.weight, (4, 3, 2, 2) given, (4, 3, 1, 1) needed)" in message


def test_another_number_of_classes_is_said_in_words(tmp_path: Path) -> None:
    torch.save(_network(1000).state_dict(), tmp_path / "imagenet.pt")
    message = _refusal(_network(10), str(tmp_path / "imagenet.pt"))
    assert "the weights are for 1000 classes, this network has 10" in message


def test_a_file_that_cannot_be_read_is_the_users_error(tmp_path: Path) -> None:
    assert "a file that exists" in _refusal(_network(), str(tmp_path / "missing.pt"))
    torch.save(_network(), tmp_path / "code.pt")
    assert "save model.state_dict() instead" in _refusal(_network(), str(tmp_path / "code.pt"))
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    assert "a readable file" in _refusal(_network(), str(tmp_path / "noise.safetensors"))
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "found ['epoch']" in _refusal(_network(), str(tmp_path / "empty.pt"))


def test_published_weights_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    published = models.squeezenet1_1().state_dict()
    monkeypatch.setattr(models.SqueezeNet1_1_Weights, "get_state_dict", lambda *_, **__: published)
    model = build_architecture(source="torchvision", name="squeezenet1_1", num_classes=1000)
    load_teacher_weights(model, "torchvision", "squeezenet1_1", "DEFAULT")
    assert _same(model, published)
    few = build_architecture(source="torchvision", name="squeezenet1_1", num_classes=10)
    with pytest.raises(ConfigError, match=r"for 1000 classes, this network has 10"):
        load_teacher_weights(few, "torchvision", "squeezenet1_1", "IMAGENET1K_V1")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_the_input_transformation_belongs_to_the_published_weights_alone(name: str) -> None:
    own_file = {"googlenet": "googlenet-1378be20.pth", "inception_v3": "inception_v3_google-0cc3c7bd.pth"}[name]
    for published in ("DEFAULT", f"/downloads/{own_file}"):
        assert options_for_weights("torchvision", name, published) == {"transform_input": True}
    for source, other, weights in (("torchvision", name, "mine.pth"), ("torchvision", name, None),
                                   ("timm", name, "DEFAULT"), ("torchvision", "resnet18", "DEFAULT")):  # fmt: skip
        assert options_for_weights(source, other, weights) == {}


def test_googlenet_is_delivered_with_the_input_transformation_of_its_published_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    published = models.GoogLeNet(aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(models.GoogLeNet_Weights, "get_state_dict", lambda *_, **__: published)
    config = compose(["teacher=torchvision", "teacher.name=googlenet", "+teacher.options.init_weights=false"])
    dataset = SimpleNamespace(classes=[str(number) for number in range(1000)], image_shape=(3, 64, 64))
    teacher = build_teacher(config, dataset, torch.device("cpu"))  # type: ignore[arg-type]
    assert _same(teacher, published)
    card = StudentCard(
        architecture=architecture_of(config, 1000),
        blocks=[],
        image_size=64,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        classes=dataset.classes,
        resize_shorter_side=64,
    )
    student = load_student(save_student(tmp_path, teacher, card)).to(memory_format=torch.channels_last)
    assert student.transform_input
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(student(images), teacher(images))


def test_without_a_network_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(models.SqueezeNet1_1_Weights, "get_state_dict", unreachable)
    with pytest.raises(ConfigError, match=r"no network.*Name or service not known.*give a file"):
        pretrained_weights("torchvision", "squeezenet1_1", "DEFAULT")


def test_timm_weights_that_cannot_be_downloaded_are_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("unreachable")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConfigError, match="no network"):
        pretrained_weights("timm", "resnet18", "DEFAULT")
    with pytest.raises(ConfigError, match="a1_in1k"):
        pretrained_weights("timm", "resnet18", "nonsense")


@pytest.mark.parametrize(
    ("source", "which", "words"), [("torchvision", "IMAGENET1K_V9", "IMAGENET1K_V1"), ("factory", "DEFAULT", "a file")]
)
def test_unknown_published_weights_are_refused(source: str, which: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pretrained_weights(source, "resnet18", which)


def test_a_backbone_loads_without_a_head_for_other_classes(tmp_path: Path) -> None:
    source = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    file = tmp_path / "ten.safetensors"
    save_file(source.state_dict(), file)
    other = build_architecture(source="cifar", name="cifar_resnet20", num_classes=7)
    assert load_backbone(other, "cifar", "cifar_resnet20", str(file)) == ("linear.weight", "linear.bias")
    assert torch.equal(other.get_parameter("layer3.2.conv2.weight"), source.get_parameter("layer3.2.conv2.weight"))


def test_a_backbone_of_another_network_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vgg.safetensors"
    save_file(build_architecture(source="cifar", name="cifar_vgg16_bn", num_classes=10).state_dict(), file)
    network = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    with pytest.raises(ConfigError, match=r"teacher.weights.*only 0 of its \d+ tensors"):
        load_backbone(network, "cifar", "cifar_resnet20", str(file))
