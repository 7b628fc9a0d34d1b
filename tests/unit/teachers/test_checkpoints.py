"""Weights as training scripts save them: wrapped, prefixed, with other things beside; and what is no checkpoint."""

from __future__ import annotations

import argparse
import datetime
import enum
import io
import logging
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distill.errors import ConfigError
from distill.teachers import build_architecture, load_backbone, load_weights

FILE = "teacher.pth"


def network(num_classes: int = 3) -> nn.Module:
    layers: dict[str, nn.Module] = {
        "conv": nn.Conv2d(3, 4, 1),
        "norm": nn.BatchNorm2d(4),
        "fc": nn.Linear(4, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def taken(path: Path, state: dict[str, Tensor]) -> bool:
    model = network()
    load_weights(model, str(path))
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items() if key in state)


def refusal(path: Path | str, model: nn.Module | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_weights(model or network(), str(path))
    assert caught.value.setting == "teacher.weights"
    assert str(path) in str(caught.value)
    return str(caught.value)


class AttributeDict(dict[str, Any]):
    """As Lightning keeps hyperparameters in."""


class Mode(enum.Enum):
    fast = 1


BESIDE = {
    "args": argparse.Namespace(lr=0.1),
    "best": np.float64(91.0),
    "history": np.arange(3),
    "folder": pathlib.PurePosixPath("runs/1"),
    "when": datetime.datetime(2024, 1, 1),
    "hyper_parameters": AttributeDict(lr=0.1),
    "counts": defaultdict(list, a=[1]),
    "mode": Mode.fast,
    "cfg": OmegaConf.create({"lr": [0.1]}),
    "metrics": {"top1", "top5"},
    "raw": bytearray(b"x"),
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_lies_beside_the_weights_does_not_matter(tmp_path: Path, protocol: int) -> None:
    state = network().state_dict()
    torch.save(BESIDE | {"state_dict": state}, tmp_path / FILE, pickle_protocol=protocol)
    assert taken(tmp_path / FILE, state)
    torch.save({"model": state} | BESIDE, tmp_path / FILE, _use_new_zipfile_serialization=False)
    assert taken(tmp_path / FILE, state)
    torch.save((3, state, BESIDE), tmp_path / FILE)
    assert taken(tmp_path / FILE, state)


@pytest.mark.parametrize(
    "names",
    ["model_state_dict", "net", "ema", "ema_state_dict", "network", "params", "my_own_name", "checkpoint model module"],
)
@pytest.mark.parametrize("prefix", ["", "model.", "backbone.", "module.net._orig_mod."])
def test_weights_are_found_under_any_names_and_prefix(tmp_path: Path, names: str, prefix: str) -> None:
    state = network().state_dict()
    content: Any = prefixed(state, prefix)
    for name in reversed(names.split()):
        content = {"epoch": 3, name: content, "loss": 0.1}
    torch.save(content, tmp_path / FILE)
    assert taken(tmp_path / FILE, state)


@pytest.mark.parametrize(
    ("better", "worse"),
    [("model_ema", "model"), ("state_dict_ema", "state_dict"), ("params_ema", "params"), ("teacher", "student"),
     ("model", "student"), ("ema", "teacher"), ("swa_state_dict", "state_dict")],
)  # fmt: skip
def test_of_several_networks_the_averaged_or_the_teacher_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, better: str, worse: str
) -> None:
    caplog.set_level(logging.INFO)
    state, other = network().state_dict(), network().state_dict()
    for content in ({worse: other, better: state}, prefixed(other, f"{worse}.") | prefixed(state, f"{better}.")):
        caplog.clear()
        torch.save(content, tmp_path / FILE)
        assert taken(tmp_path / FILE, state)
        assert f"under {better}" in caplog.text
        assert f"not those under {worse}" in caplog.text


def test_the_place_whose_shapes_fit_goes_before_any_name(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save({"teacher": network(7).state_dict(), "student": state}, tmp_path / FILE)
    assert taken(tmp_path / FILE, state)


def test_an_averaged_model_is_read_without_its_counter(tmp_path: Path) -> None:
    model = network()
    torch.save({"model_ema": AveragedModel(nn.DataParallel(model)).state_dict()}, tmp_path / FILE)
    assert taken(tmp_path / FILE, model.state_dict())


def test_what_is_no_part_of_the_network_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = network().state_dict()
    beside = {"criterion.weight": torch.ones(3), "total_ops": torch.zeros(1), "model.conv.total_params": torch.zeros(1)}
    torch.save({"state_dict": prefixed(state, "model.") | beside}, tmp_path / FILE)
    assert taken(tmp_path / FILE, state)
    assert "left out, for the network has no such names: criterion.weight" in caplog.text
    assert "total_" not in caplog.text


def test_a_larger_network_is_not_cut_down_to_this_one(tmp_path: Path) -> None:
    larger = build_architecture(source="cifar", name="cifar_resnet32", num_classes=10)
    torch.save(prefixed(larger.state_dict(), "module."), tmp_path / FILE)
    smaller = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    assert "unexpected (first: layer1.3.conv1.weight); all that the network has is there" in refusal(
        tmp_path / FILE, smaller
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype) -> None:
    caplog.set_level(logging.INFO)
    state = network().to(torch.bfloat16).state_dict()
    torch.save({key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()},
               tmp_path / FILE)  # fmt: skip
    model = network()
    load_weights(model, str(tmp_path / FILE))
    assert torch.equal(model.state_dict()["fc.weight"], state["fc.weight"].float())
    assert f"weights in {str(dtype)[6:]} are computed with in float32" in caplog.text


def test_a_tensor_of_several_names_is_saved_under_one(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        conv = nn.Conv2d(3, 3, 1)
        return nn.Sequential(conv, nn.ReLU(), conv)

    given, model = tied(), tied()
    save_model(given, str(tmp_path / "tied.safetensors"))
    load_weights(model, str(tmp_path / "tied.safetensors"))
    assert torch.equal(model.get_parameter("2.weight"), given.get_parameter("0.weight"))


def test_safetensors_are_known_by_their_content_and_may_have_prefixes(tmp_path: Path) -> None:
    state = network().state_dict()
    save_file(prefixed(state, "ema.") | prefixed(network().state_dict(), "model."), tmp_path / "weights.bin")
    assert taken(tmp_path / "weights.bin", state)
    torch.save(state, tmp_path / "torch.safetensors")
    assert taken(tmp_path / "torch.safetensors", state)


def test_tensors_of_a_subclass_and_parameters_are_read_as_plain_ones(tmp_path: Path) -> None:
    from torchvision.tv_tensors import Image

    state = network().state_dict()
    wrapped = {
        key: nn.Parameter(value, value.is_floating_point()) if "fc" in key else value for key, value in state.items()
    }
    torch.save(wrapped | {"conv.weight": state["conv.weight"].as_subclass(Image)}, tmp_path / FILE)  # type: ignore[arg-type]
    assert taken(tmp_path / FILE, state)


class _Evil:
    """Unpickled, it would make a file; so would calling what a pickle may reach by way of attributes."""

    def __init__(self, call: Any, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "within", "alone"])
def test_nothing_in_a_file_is_run(tmp_path: Path, zipped: bool, place: str) -> None:
    mark = tmp_path / "was-run"
    program = f"open({str(mark)!r}, 'w')"
    calls = [(os.system, f"touch {mark}"), (exec, program), (os.mkdir, str(mark)), (torch.save, 1, str(mark))]
    for evil in (_Evil(*call) for call in calls):
        state: dict[str, Any] = dict(network().state_dict())
        content = {"beside": {"model": state, "x": evil}, "within": state | {"fc.weight": evil}, "alone": evil}[place]
        torch.save(content, tmp_path / FILE, _use_new_zipfile_serialization=zipped)
        if place == "beside":
            assert taken(tmp_path / FILE, state)
        else:
            refusal(tmp_path / FILE)
        assert not mark.exists()


def test_a_file_cannot_change_the_functions_that_it_may_call(tmp_path: Path) -> None:
    """BUILD with a state of slots sets attributes on whatever the pickle has named."""
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__code__K\x01s\x86b."
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/version", "3")
        archive.writestr("a/byteorder", "little")
    assert "it tries to change a function" in refusal(tmp_path / FILE)


def test_a_dictionary_within_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / FILE)
    assert "found ['epoch', 'model']" in refusal(tmp_path / FILE)


def _zip_of_zeros(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"")
        with archive.open("a/data/0", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(2**20))


def _tar(path: Path) -> None:
    import tarfile

    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())


def _torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/constants.pkl", b"")


def _truncated(path: Path) -> None:
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def _other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", b"x")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_text("<!DOCTYPE html><html>sign in</html>"), "a web page"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(9)), "gunzip"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(9)), "HDF5"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a readable file of tensors"),
        (lambda path: path.write_bytes(os.urandom(999)), "a readable file of tensors"),
        (lambda path: path.mkdir(), "a file (safetensors, or written by torch.save), not a folder"),
        (_truncated, "its end is missing"),
        (_zip_of_zeros, "its table of contents tells of 0.1 GiB in a file of 0.000 GiB"),
        (_tar, "a tar archive"),
        (_torchscript, "a TorchScript program"),
        (_other_zip, "a zip archive of something else"),
        (lambda path: torch.save(network(), path), "save model.state_dict() instead"),
        (lambda path: torch.save({"model": network()}, path), "under 'model' torch.nn.modules.container.Sequential"),
        (lambda path: torch.save(network().to("meta").state_dict(), path), "9 are not: conv.weight is a torch._utils"),
        (lambda path: torch.save(["weights"], path), "found list"),
        (lambda path: torch.save(network(10).state_dict(), path), "for 10 classes, this network has 3"),
        (lambda path: torch.save({k: v.int() for k, v in network().state_dict().items()}, path), "is int32"),
        (lambda path: torch.save({k: v / 0 for k, v in network().state_dict().items()}, path), "NaN or infinity"),
    ],
)
def test_what_is_no_checkpoint_of_the_network_is_told_by_name(tmp_path: Path, write: Any, words: str) -> None:
    write(tmp_path / FILE)
    assert words in refusal(tmp_path / FILE)


def test_parts_of_a_checkpoint_and_folders_of_parts_are_told_by_name(tmp_path: Path) -> None:
    part = tmp_path / "model-00001-of-00003.safetensors"
    save_file(network().state_dict(), part)
    assert "part 1 of 3" in refusal(part)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "the index of several files" in refusal(tmp_path / "model.safetensors.index.json")
    assert "in it: model-00001-of-00003.safetensors" in refusal(tmp_path)
    (tmp_path / ".metadata").touch()
    assert "dcp_to_torch" in refusal(tmp_path)
    assert "a file that exists" in refusal("~nobody-of-this-name/x.pth") or "home" in refusal(
        "~nobody-of-this-name/x.pth"
    )


def test_a_backbone_is_found_in_wrapping_too(tmp_path: Path) -> None:
    state = network(10).state_dict()
    torch.save({"state_dict": prefixed(state, "backbone."), "args": argparse.Namespace()}, tmp_path / FILE)
    model = network(3)
    assert load_backbone(model, "factory", "", str(tmp_path / FILE)) == ("fc.weight", "fc.bias")
    assert torch.equal(model.get_parameter("conv.weight"), state["conv.weight"])
