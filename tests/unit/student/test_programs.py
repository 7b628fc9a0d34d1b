"""Delivered programs: compared before they are written, for any batch size; failures are recorded, not raised."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.student import onnx_programs, programs
from distill.student.files import StudentCard
from distill.student.programs import CARD, FORMS, TOLERANCE, compare, deliver_programs

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [IMAGES[:5], IMAGES[5:10], IMAGES[10:]]
CARD_HERE = StudentCard(
    architecture={"source": "cifar", "name": "cifar_resnet20", "num_classes": 4},
    blocks=[],
    image_size=8,
    mean=[0.5, 0.5, 0.5],
    std=[0.2, 0.2, 0.2],
    classes=["ant", "bee", "cow", "dog"],
    resize_shorter_side=9,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def deliver(folder: Path, student: nn.Module | None = None) -> dict[str, dict[str, object]]:
    return deliver_programs(folder, student or network(), CARD_HERE, BATCHES)


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("delivered")
    return folder, deliver(folder)


class TestCompare:
    def test_equal_programs_do_not_differ(self) -> None:
        student = network()
        found = compare(student, student, BATCHES)
        assert dataclasses.astuple(found) == (0.0, 100.0, 12)

    def test_the_largest_difference_of_any_image_counts(self) -> None:
        def eager(images: Tensor) -> Tensor:
            return images.flatten(1)[:, :3]

        def program(images: Tensor) -> Tensor:
            return eager(images) + 0.5 * (images == IMAGES[11]).all(dim=(1, 2, 3))[:, None]

        assert compare(program, eager, BATCHES).max_abs_difference == pytest.approx(0.5)

    def test_agreement_is_the_percentage_of_equal_first_guesses(self) -> None:
        def eager(images: Tensor) -> Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

        def program(images: Tensor) -> Tensor:
            other = (images == IMAGES[0]).all(dim=(1, 2, 3)) | (images == IMAGES[6]).all(dim=(1, 2, 3))
            return torch.where(other[:, None], torch.tensor([[0.0, 1.0]]), eager(images))

        assert compare(program, eager, BATCHES).top1_agreement == pytest.approx(100 * 10 / 12)

    @pytest.mark.parametrize("wrong", [1, 7])
    def test_batches_of_one_and_seven_are_tried_even_where_the_images_come_otherwise(self, wrong: int) -> None:
        def program(images: Tensor) -> Tensor:
            return images.flatten(1) + (len(images) == wrong)

        assert compare(program, lambda images: images.flatten(1), BATCHES).max_abs_difference == pytest.approx(1.0)

    def test_not_a_number_is_never_within_the_tolerance(self) -> None:
        found = compare(lambda images: images.flatten(1) * math.nan, lambda images: images.flatten(1), BATCHES)
        assert math.isnan(found.max_abs_difference)

    def test_three_images_are_enough(self) -> None:
        student = network()
        assert compare(student, student, [IMAGES[:3]]).images == 3


class TestDelivered:
    def test_both_are_written_and_say_what_was_measured(
        self, delivered: tuple[Path, dict[str, dict[str, object]]]
    ) -> None:
        folder, records = delivered
        assert sorted(path.name for path in folder.iterdir()) == ["student.onnx", "student.pt2"]
        for name, record in records.items():
            assert record["status"] == "ok"
            assert record["file"] == f"student.{name}"
            assert record["images"] == 12
            assert record["top1_agreement"] == 100.0
            assert 0 <= record["max_abs_difference"] <= 1e-5  # type: ignore[operator]

    @pytest.mark.parametrize("size", [1, 2, 7, 33])
    @pytest.mark.parametrize("name", sorted(FORMS))
    @torch.no_grad()
    def test_the_file_takes_any_batch_size(
        self, delivered: tuple[Path, dict[str, dict[str, object]]], name: str, size: int
    ) -> None:
        images = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(size))
        program = FORMS[name].load((delivered[0] / FORMS[name].file).read_bytes())
        torch.testing.assert_close(program(images), network()(images), rtol=0, atol=1e-5)

    def test_pt2_names_its_input_and_wants_no_gradients(
        self, delivered: tuple[Path, dict[str, dict[str, object]]]
    ) -> None:
        program = torch.export.load(delivered[0] / "student.pt2")
        assert program.graph_signature.user_inputs == ("images",)
        assert not program.module()(IMAGES).requires_grad

    def test_onnx_names_input_output_and_batch_and_is_one_file(
        self, delivered: tuple[Path, dict[str, dict[str, object]]]
    ) -> None:
        graph = pytest.importorskip("onnx").load(delivered[0] / "student.onnx", load_external_data=False).graph
        assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert not [tensor.name for tensor in graph.initializer if tensor.external_data]

    def test_the_card_is_in_both(self, delivered: tuple[Path, dict[str, dict[str, object]]]) -> None:
        onnx = pytest.importorskip("onnx")
        inside = {CARD: ""}
        torch.export.load(delivered[0] / "student.pt2", extra_files=inside)
        props = {entry.key: entry.value for entry in onnx.load(delivered[0] / "student.onnx").metadata_props}
        expected = dataclasses.asdict(CARD_HERE)
        assert json.loads(inside[CARD]) == expected
        assert json.loads(props[CARD]) == expected

    def test_no_path_of_this_machine_is_in_them(self, delivered: tuple[Path, dict[str, dict[str, object]]]) -> None:
        for form in FORMS.values():
            content = (delivered[0] / form.file).read_bytes()
            assert [text for text in (b"site-packages", b"programs.py", __file__.encode()) if text in content] == []

    def test_the_student_itself_is_left_as_it_was(self, tmp_path: Path) -> None:
        student = network().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        assert deliver(tmp_path, student)["pt2"]["status"] == "ok"
        assert student.training
        assert all(parameter.requires_grad for parameter in student.parameters())
        assert student[0].weight.is_contiguous(memory_format=torch.channels_last)

    def test_nothing_of_the_exporters_reaches_the_user(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            deliver(tmp_path)
        assert capfd.readouterr() == ("", "")
        assert told == []


def replaced_form(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Callable[..., object]) -> None:
    monkeypatch.setitem(programs.FORMS, name, dataclasses.replace(FORMS[name], **changes))  # type: ignore[arg-type]


class TestFailures:
    @pytest.mark.parametrize("name", sorted(FORMS))
    @pytest.mark.parametrize("wrong", [lambda x: x + 2 * TOLERANCE, lambda x: x * math.nan], ids=["off", "nan"])
    def test_a_program_that_differs_is_refused_and_leaves_no_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[[Tensor], Tensor]
    ) -> None:
        load = FORMS[name].load
        replaced_form(monkeypatch, name, load=lambda content: lambda images: wrong(load(content)(images)))
        (tmp_path / f"student.{name}").write_text("of an earlier delivery")
        records = deliver(tmp_path)
        assert records[name]["status"] == "failed"
        assert "differ from the eager student's" in str(records[name]["reason"])
        other = next(form for form in FORMS if form != name)
        assert records[other]["status"] == "ok"
        assert [path.name for path in tmp_path.iterdir()] == [f"student.{other}"]

    def test_rounding_of_large_logits_is_no_difference(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load = FORMS["onnx"].load
        replaced_form(monkeypatch, "onnx", load=lambda content: lambda images: load(content)(images) * (1 + 1e-5))
        large = network()
        next(large.parameters()).data.mul_(1e5)
        record = deliver(tmp_path, large)["onnx"]
        assert record["status"] == "ok"
        assert record["max_abs_difference"] > 1e-3  # type: ignore[operator]

    @pytest.mark.parametrize("name", sorted(FORMS))
    def test_a_program_with_other_weights_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        make = FORMS[name].make

        def with_other_weights(module: nn.Module, images: Tensor, card: str) -> bytes:
            other = copy.deepcopy(module)
            for parameter in other.parameters():
                parameter.mul_(1.1)
            return make(other, images, card)

        replaced_form(monkeypatch, name, make=with_other_weights)
        assert deliver(tmp_path)[name]["status"] == "failed"

    def test_a_program_for_one_batch_size_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fixed(content: bytes) -> Callable[[Tensor], Tensor]:
            def program(images: Tensor) -> Tensor:
                if len(images) != 5:
                    raise RuntimeError("Got invalid dimensions for input: images\nindex: 0 Got: 1 Expected: 5")
                return network()(images)

            return program

        replaced_form(monkeypatch, "onnx", load=fixed)
        record = deliver(tmp_path)["onnx"]
        assert record["status"] == "failed"
        assert record["reason"] == "RuntimeError: Got invalid dimensions for input: images"

    def test_whatever_an_exporter_raises_is_recorded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def make(*_: object) -> bytes:
            raise AssertionError

        replaced_form(monkeypatch, "pt2", make=make)
        record = deliver(tmp_path)["pt2"]
        assert record["status"] == "failed"
        assert record["reason"] == "AssertionError: no reason given"

    def test_a_network_that_cannot_be_exported_fails_with_a_reason(self, tmp_path: Path) -> None:
        class Branching(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return images.flatten(1) if images.sum() > 0 else -images.flatten(1)

        records = deliver(tmp_path, Branching())
        assert {record["status"] for record in records.values()} == {"failed"}
        assert all(record["reason"] for record in records.values())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("package", FORMS["onnx"].packages)
    def test_an_absent_package_says_how_to_install_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / "student.onnx").write_text("of an earlier delivery")
        records = deliver(tmp_path)
        assert records["onnx"]["status"] == "not installed"
        assert "pip install -e '.[onnx]'" in str(records["onnx"]["reason"])
        assert package in str(records["onnx"]["reason"])
        assert [path.name for path in tmp_path.iterdir()] == ["student.pt2"]

    def test_more_weights_than_one_onnx_file_holds_is_a_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(onnx_programs, "ONNX_BYTES", 100)
        record = deliver(tmp_path)["onnx"]
        assert record["status"] == "failed"
        assert "ends at 2 GiB" in str(record["reason"])
