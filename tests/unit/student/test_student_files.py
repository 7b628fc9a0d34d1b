"""The delivered student: what is saved is what is loaded, and what cannot be loaded says why."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distill
from distill.errors import DistillError
from distill.recipes import Separable, replace_convolutions
from distill.storage.files import read_json, write_json
from distill.student.files import FORMAT, StudentCard, load_student, save_student
from distill.teachers import build_architecture

ARCHITECTURE = {"source": "cifar", "name": "cifar_resnet20", "num_classes": 10}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def block(paths: list[str], **options: Any) -> dict[str, Any]:
    chosen = {"rank": 2, "init": "teacher"} | options
    return {"recipe": "separable", "options": chosen, "changes": {"convolutions": paths}}


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    network = build_architecture(**ARCHITECTURE)  # type: ignore[arg-type]
    recipe = Separable(rank=2, init="teacher")
    paths = [name for name, module in network.named_modules() if recipe.fits(module)]
    replace_convolutions(network, paths, recipe, torch.Generator().manual_seed(0))
    network.train()
    network(torch.randn(16, 3, 32, 32))  # batch-norm statistics that are not those of a new network
    return network.eval()


@pytest.fixture(scope="module")
def card(student: nn.Module) -> StudentCard:
    paths = [name for name, module in student.named_modules() if type(module).__name__ == "SeparableConv2d"]
    assert len(paths) == 19
    return StudentCard(
        architecture=ARCHITECTURE,
        blocks=[block(paths)],
        image_size=32,
        mean=[0.5, 0.5, 0.5],
        std=[0.2, 0.2, 0.2],
        classes=[str(digit) for digit in range(10)],
        resize_shorter_side=32,
    )


@pytest.fixture
def folder(tmp_path: Path, student: nn.Module, card: StudentCard) -> Path:
    save_student(tmp_path, student, card)
    return tmp_path


@torch.no_grad()
def logits(network: nn.Module) -> torch.Tensor:
    return network(IMAGES)


@pytest.mark.parametrize("given", ["", "student.safetensors", "student.json"])
def test_a_loaded_student_gives_bitwise_the_same_logits(folder: Path, student: nn.Module, given: str) -> None:
    loaded = load_student(folder / given)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(student))


def test_a_student_in_channels_last_is_saved_with_the_same_values(
    tmp_path: Path, student: nn.Module, card: StudentCard
) -> None:
    last = load_student(save_student(tmp_path / "plain", student, card)).to(memory_format=torch.channels_last)
    save_student(tmp_path / "last", last, card)
    loaded = load_student(tmp_path / "last").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in student.state_dict().items())


def test_loading_does_not_touch_the_random_state_of_the_caller_s_results(folder: Path, student: nn.Module) -> None:
    torch.manual_seed(99)  # the fresh network's weights are random: none of them may be left
    assert torch.equal(logits(load_student(folder)), logits(student))


def test_the_package_offers_it_by_name(folder: Path) -> None:
    assert distill.load_student is load_student
    with pytest.raises(AttributeError, match="no attribute 'load_teacher'"):
        _ = distill.load_teacher


def test_the_card_is_plain_json(folder: Path, card: StudentCard) -> None:
    written = json.loads((folder / "student.json").read_text())
    assert {name: written[name] for name in written.keys() - {"weights_sha256", "checksum"}} == dataclasses.asdict(card)
    assert written["weights_sha256"] == hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("missing", ["student.json", "student.safetensors"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(DistillError, match=f"^no student at {folder}: {missing} is missing"):
        load_student(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=f"no student at {tmp_path}/nowhere"):
        load_student(tmp_path / "nowhere")


@pytest.mark.parametrize("form", [FORMAT + 1, None])
def test_a_card_of_another_format_is_refused(folder: Path, form: int | None) -> None:
    write_json(folder / "student.json", read_json(folder / "student.json") | {"format": form})
    with pytest.raises(
        DistillError, match=rf"student\.json: format {form}, but this version reads formats 1 and {FORMAT}"
    ):
        load_student(folder)


def test_a_card_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "student.json").write_text('{"format": 1, "archi')
    with pytest.raises(DistillError, match=r"student\.json"):
        load_student(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architecture": {"source": "cifar", "name": "cifar_resnet21", "num_classes": 4}},
            "cannot be built here.*nearest",
        ),
        (
            {"architecture": {"source": "factory", "name": "", "num_classes": 4, "factory": "gone:net"}},
            r"gone:net makes.*load_student\(path, factory=",
        ),
        ({"architecture": None}, "no card of a student that this version can build"),
        ({"blocks": [{"recipe": "later", "options": {}, "changes": {}}]}, "cannot be built here.*'later'"),
        ({"blocks": [block(["layer9.conv"])]}, "no card of a student"),
        ({"blocks": [{"recipe": "separable"}]}, "no card of a student"),
        ({"blocks": [block([], depth=2)]}, "no card of a student"),
        ({"blocks": []}, "not the weights of student.json's network"),
        ({"weights_sha256": None}, "not the weights that student.json is about"),
    ],
)
def test_a_card_of_another_student_is_told_as_that(folder: Path, changes: dict[str, Any], words: str) -> None:
    write_json(folder / "student.json", read_json(folder / "student.json") | changes)
    with pytest.raises(DistillError, match=words):
        load_student(folder)


def test_a_card_of_format_1_is_read_as_before(folder: Path, student: nn.Module) -> None:
    """One recipe for the whole network, and the convolutions that it replaced."""
    card = read_json(folder / "student.json")
    (one,) = card.pop("blocks")
    old = {"recipe": {"name": one["recipe"], "options": one["options"]}, "replaced": one["changes"]["convolutions"]}
    write_json(folder / "student.json", card | old | {"format": 1})
    assert torch.equal(logits(load_student(folder)), logits(student))


def test_a_network_of_the_user_s_own_is_built_by_the_factory_that_is_given_and_by_no_other(
    folder: Path, student: nn.Module
) -> None:
    facts = {"source": "factory", "name": "x", "num_classes": 10, "factory": "os:getcwd", "options": {"deep": 2}}
    write_json(folder / "student.json", read_json(folder / "student.json") | {"architecture": facts})

    def mine(num_classes: int, *, deep: int) -> nn.Module:
        assert (num_classes, deep) == (10, 2)
        return build_architecture(**ARCHITECTURE)  # type: ignore[arg-type]

    assert torch.equal(logits(load_student(folder, factory=mine)), logits(student))
    with pytest.raises(DistillError, match=r"os:getcwd makes.*load_student\(path, factory="):
        load_student(folder)
    with pytest.raises(DistillError, match="factory has returned a str"):
        load_student(folder, factory=lambda **_: "x")  # type: ignore[arg-type, return-value]


class Mine(Separable):
    """A recipe from outside."""


def test_a_recipe_from_outside_is_the_class_that_is_given(folder: Path, student: nn.Module) -> None:
    card = read_json(folder / "student.json")
    card["blocks"][0]["recipe"] = "my_package:Mine"
    write_json(folder / "student.json", card)
    with pytest.raises(DistillError, match=r"the recipe 'my_package:Mine', whose class load_student\(recipes="):
        load_student(folder)
    assert torch.equal(logits(load_student(folder, recipes={"my_package:Mine": Mine})), logits(student))


def test_weights_cut_short_are_refused(folder: Path) -> None:
    weights = (folder / "student.safetensors").read_bytes()
    (folder / "student.safetensors").write_bytes(weights[:-10])
    with pytest.raises(DistillError, match=r"student\.safetensors"):
        load_student(folder)


def test_the_package_shows_load_student_without_importing_torch() -> None:
    program = "import sys, distill; sys.stdout.write(f\"{'load_student' in dir(distill)} {'torch' in sys.modules}\")"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True False"
    assert distill.load_student is load_student
