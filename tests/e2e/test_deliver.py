"""What a run delivers: programs that need nothing of this package, the documented examples, and delivering again."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from distill.config.load import from_yaml
from distill.data import decoding
from distill.data.decoding import Squaring
from distill.data.digits import open_digits
from distill.deployment.forms import REPEATED
from distill.job.data import open_data
from distill.recipes import RECIPES, replace_convolutions
from distill.storage.files import read_json
from distill.student.assemble import recalibrate
from distill.student.files import StudentCard, load_student
from distill.student.programs import FORMS, deliver_programs
from distill.teachers import build_architecture
from tests.documents import fenced
from tests.e2e.command import environment, metrics, torchrun
from tests.matrix import matrix

PAGE = "docs/deploy.md"
PREPARE, *WAYS, PT2_CARD, ONNX_CARD = fenced(PAGE, "python")
WAY_NAMES = ("load_student", "pt2", "onnx")
NO_PACKAGE = 'import sys; sys.modules["distill"] = None\n'  # any import of it fails
GUESS = '\nprint(card["classes"][int(logits.argmax())], logits.tolist())\n'
FILES = ("student.safetensors", "student.json", "student.pt2", "student.onnx", "teacher.onnx", "metrics.json",
         "report.html")  # fmt: skip


@pytest.fixture(scope="module")
def run(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was moved elsewhere."""
    return Path(shutil.copytree(finished[0], tmp_path_factory.mktemp("moved") / "run"))


@pytest.fixture
def handed_over(run: Path, tmp_path: Path) -> Path:
    """The delivered files alone, beside a picture of a digit."""
    for name in FILES[:4]:
        shutil.copy(run / name, tmp_path)
    test = open_digits().open_test()
    test.open(0).save(tmp_path / "picture.png")
    return tmp_path


def eager_logits(folder: Path) -> torch.Tensor:
    """The student's answer to the first test image as the job itself reads it."""
    config = from_yaml((folder / "resolved.yaml").read_text())
    with open_data(config, torch.device("cpu"), ranks_here=1) as dataset, torch.no_grad():
        return load_student(folder)(next(iter(dataset.test_batches(1))).images)


def isolated(program: str, cwd: Path) -> str:
    """Run a program in an interpreter that sees no environment and no package of this name; return what it prints."""
    command = [sys.executable, "-I", "-W", "error::UserWarning", "-c", NO_PACKAGE + program]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def checked(printed: str, folder: Path) -> None:
    """Assert that a program printed the class and the logits of the eager student."""
    name, _, logits = printed.strip().partition(" ")
    expected = eager_logits(folder)
    classes = json.loads((folder / "student.json").read_text())["classes"]
    assert name == classes[int(expected.argmax())]
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, rtol=0, atol=1e-3)


class TestDocumented:
    def test_load_student_classifies_a_picture(self, run: Path, handed_over: Path) -> None:
        command = [sys.executable, "-c", PREPARE + WAYS[0] + GUESS]
        done = subprocess.run(
            command, cwd=handed_over, env=environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        checked(done.stdout.splitlines()[-1], run)

    @pytest.mark.parametrize(("way", "file"), [(1, "student.pt2"), (2, "student.onnx")], ids=WAY_NAMES[1:])
    def test_a_program_and_the_json_classify_a_picture_without_this_package(
        self, run: Path, handed_over: Path, way: int, file: str
    ) -> None:
        for other in set(FILES[:4]) - {file, "student.json"}:
            (handed_over / other).unlink()
        checked(isolated(PREPARE + WAYS[way] + GUESS, handed_over).splitlines()[-1], run)

    def test_onnx_needs_no_torch(self, run: Path, handed_over: Path) -> None:
        program = 'sys.modules["torch"] = None\n' + PREPARE + WAYS[2] + GUESS
        checked(isolated(program, handed_over).splitlines()[-1], run)

    @pytest.mark.parametrize(
        ("program", "file"), [(PT2_CARD, "student.pt2"), (ONNX_CARD, "student.onnx")], ids=["pt2", "onnx"]
    )
    def test_a_program_alone_has_its_card_inside(self, handed_over: Path, program: str, file: str) -> None:
        card = read_json(handed_over / "student.json")
        del card["weights_sha256"]
        for other in set(FILES[:4]) - {file}:
            (handed_over / other).unlink()
        assert json.loads(isolated(program + "\nprint(json.dumps(card))\n", handed_over)) == card

    @pytest.mark.parametrize("program", fenced("README.md", "python"), ids=WAY_NAMES)
    def test_the_readme_s_lines_work(self, run: Path, handed_over: Path, program: str) -> None:
        given = f'{PREPARE}\nimages = prepare("picture.png")\n{program}{GUESS}'
        done = subprocess.run(
            [sys.executable, "-c", given], cwd=handed_over, env=environment(), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        checked(done.stdout.splitlines()[-1], run)

    @pytest.mark.parametrize("side", [32, 37], ids=["as in memory", "as streamed"])
    @pytest.mark.parametrize("size", [(32, 32), (37, 37), (32, 48), (61, 45), (333, 500), (20, 9)])
    def test_a_picture_is_prepared_as_test_images_are(self, tmp_path: Path, size: tuple[int, int], side: int) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        picture.save(tmp_path / "picture.png")
        card = {
            "image_size": 32,
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "resize_shorter_side": side,
            "exif_orientation": True,
        }
        for filtering, aspect in itertools.product(["bilinear", "bicubic"], ["kept", "squashed"]):
            form = Squaring(32, None, filtering, aspect == "squashed")
            ours = decoding.fit(picture, form) if side == 32 else decoding.evaluation_view(picture, form)
            card |= {"resize_filter": f"{filtering}, antialiased", "aspect": aspect}
            assert np.array_equal(prepared(tmp_path, card), decoding.pixels(ours))


def prepared(folder: Path, card: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """The pixels (H, W, 3) that the documented prepare() makes of picture.png."""
    names: dict[str, Any] = {}
    definition = PREPARE[PREPARE.index("def prepare") :]
    exec(f"import numpy\nfrom PIL import Image, ImageOps\n{definition}", names)
    names["card"] = card
    images = names["prepare"](folder / "picture.png")
    return (images[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("source", "name", "recipe", "size"),
    matrix(
        [
            ("cifar", "cifar_resnet20", "separable_x2", 16),
            ("cifar", "cifar_vgg16_bn", "separable_x2", 32),
            ("torchvision", "mobilenet_v2", "separable", 32),
            ("torchvision", "resnet18", "separable", 32),
        ]
    ),
)
def test_students_of_every_family_export(tmp_path: Path, source: str, name: str, recipe: str, size: int) -> None:
    torch.manual_seed(0)
    student = build_architecture(source=source, name=name, num_classes=10)
    made = RECIPES[recipe](rank=2, init="teacher" if recipe == "separable" else "random")
    paths = [path for path, module in student.named_modules() if made.fits(module)]
    paths = paths[::3] if recipe == "separable_x2" else paths  # random layers in a row blow rounding errors up
    assert paths
    replace_convolutions(student, paths, made, torch.Generator().manual_seed(0))
    images = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))
    recalibrate(student, [images])  # else random weights give logits of thousands, and rounding errors to match
    card = StudentCard(
        architecture={}, blocks=[], image_size=size, mean=[0.5] * 3, std=[0.5] * 3, classes=[],
        resize_shorter_side=size,
    )  # fmt: skip
    records = deliver_programs(tmp_path, student, card, [images])
    assert {name: record["status"] for name, record in records.items()} == {"pt2": "ok", "onnx": "ok"}, records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.onnx", "student.pt2"]


class TestAgain:
    def test_the_user_is_told_what_was_compared_and_not_how(self, finished: tuple[Path, str]) -> None:
        for file in (*(form.file for form in FORMS.values()), "teacher.onnx"):
            assert f"{file}: logits within" in finished[1]
        assert "torch.onnx" not in finished[1]

    def test_the_records_are_in_the_metrics(self, run: Path) -> None:
        found = metrics(run)["exports"]
        assert set(found) == {*FORMS, "teacher_onnx"}
        for record in found.values():
            assert record["status"] == "ok"
            assert record["images"] == 256
            assert record["max_abs_difference"] <= 1e-3

    def test_latency_is_that_of_the_files_in_their_runtime(self, run: Path) -> None:
        found = metrics(run)["latency"]
        assert (found["runtime"], found["threads"], found["batch"], found["precision"]) == (
            "onnxruntime",
            1,
            64,
            "fp32",
        )
        assert set(found["batches"]) == {"1", "64"}
        for one in found["batches"].values():
            assert one["ratio"] == pytest.approx(one["student"]["median_ms"] / one["teacher"]["median_ms"])
            for side in ("teacher", "student"):
                timing = one[side]
                assert 0 < timing["low_ms"] <= timing["median_ms"] <= timing["high_ms"]
                assert timing["rounds"] >= 1

    def test_int8_programs_answer_as_the_metrics_say(self, run: Path) -> None:
        found = metrics(run)["int8"]
        assert found["images"] == 512
        config = from_yaml((run / "resolved.yaml").read_text())
        with open_data(config, torch.device("cpu"), ranks_here=1) as dataset:
            images, labels = zip(*((one.images, one.labels) for one in dataset.test_batches(250)), strict=True)
        for side in ("teacher", "student"):
            record, whole = found[side], run / f"{side}.onnx"
            assert record["status"] == "ok"
            assert record["bytes"] == (run / record["file"]).stat().st_size < whole.stat().st_size
            session = onnxruntime.InferenceSession(run / record["file"])
            kinds = {node.op_type for node in onnx.load(run / record["file"]).graph.node}
            assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
            guesses = [session.run(["logits"], {"images": one.numpy()})[0].argmax(1) for one in images]
            right = sum(int((guess == wanted.numpy()).sum()) for guess, wanted in zip(guesses, labels, strict=True))
            # Rounding on other numbers of threads moves what lies between two levels: an image or two are guessed anew.
            assert record["top1"] == pytest.approx(100 * right / sum(map(len, labels)), abs=1.5)
        student = found["student"]
        assert student["form"] == min(student["ms"], key=student["ms"].__getitem__)
        kinds = [node.op_type for node in onnx.load(run / "student_int8.onnx").graph.node]
        assert ("Concat" in kinds) == (student["form"] == REPEATED)
        for one in found["latency"]["batches"].values():
            assert one["ratio"] == pytest.approx(one["student"]["median_ms"] / one["teacher"]["median_ms"])
        # Some training for INT8 or none, as a few validation images have it; what was trained is told and kept.
        training = student.get("training", {"blocks": {}})
        assert (run / "int8.safetensors").exists() == bool(training["blocks"])
        assert student["validation_top1"] == max(
            training.get("validation_top1", {"": student["validation_top1"]}).values()
        )

    def test_another_device_s_table_takes_the_place_of_measuring_here(self, run: Path) -> None:
        made = distill_again(run.parent, "latency", "bundle", "run=run", "out=bundle", "deploy.batch=8")
        assert made.returncode == 0, made.stderr
        assert made.stderr == ""
        script = [sys.executable, "-I", "bundle/measure.py", "--seconds", "0.02"]
        done = subprocess.run(script, cwd=run.parent, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        table = json.loads((run.parent / "bundle" / "table.json").read_text())
        table["environment"]["cpu"] = "A Board"
        (run.parent / "table.json").write_text(json.dumps(table))
        result = distill_again(run.parent, "stage=deliver", "run=run", "deploy.batch=8", "deploy.table=table.json")
        assert result.returncode == 0, result.stderr
        found = metrics(run)["latency"]
        assert (found["cpu"], found["table"], set(found["batches"])) == ("A Board", "table.json", {"1", "8", "64"})
        again = distill_again(run.parent, "stage=deliver", "run=run", "deploy.table=null", "deploy.batch=64")
        assert again.returncode == 0, again.stderr
        assert "table" not in metrics(run)["latency"]

    def test_the_same_student_is_delivered_and_nothing_else_changes(self, run: Path) -> None:
        before, student = metrics(run), digest(run / "student.safetensors")
        kept = {path: digest(path) for path in kept_files(run)}
        assert len(kept) > 10
        for name in FILES:
            (run / name).unlink()
        (command,) = fenced(PAGE, "sh")
        python, *arguments = command.replace("outputs/NAME/FINGERPRINT", "run").split()
        assert (python, *arguments[:2]) == ("python", "-m", "distill")
        result = distill_again(run.parent, *arguments[2:])
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stderr == ""
        assert "epoch" not in result.stdout
        assert [name for name in FILES if not (run / name).exists()] == []
        assert digest(run / "student.safetensors") == student
        assert {path: digest(path) for path in kept_files(run)} == kept
        after = metrics(run)
        for section in ("distill", "assemble", "finetune", "blocks", "exports", "fingerprint"):
            assert after[section] == before[section]
        assert after["student"]["top1"] == before["student"]["top1"]

    def test_programs_that_are_not_asked_for_go(self, run: Path) -> None:
        result = distill_again(run.parent, "stage=deliver", "run=run", "deploy.programs=[pt2]")
        assert result.returncode == 0, result.stderr
        assert {one.name for one in run.glob("*.onnx")} == set()
        found = metrics(run)
        assert {name: one["status"] for name, one in found["exports"].items()} == {
            "pt2": "ok",
            "onnx": "not asked for",
            "teacher_onnx": "not asked for",
        }
        assert found["latency"]["reason"] == "teacher.onnx: not in deploy.programs"

    def test_under_torchrun_the_shorthand_prints_the_finished_run(self, run: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        result = subprocess.run(
            [*command, "-m", "distill", "run=run"],
            cwd=run.parent, env=environment(), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "teacher against student" in result.stdout
        assert "epoch" not in result.stdout

    def test_another_setting_that_decides_the_student_is_refused(self, run: Path) -> None:
        before = digest(run / "metrics.json")
        result = distill_again(run.parent, "stage=deliver", "run=run", "distill.lr=0.5")
        assert result.returncode != 0
        assert "run.dir: got" in result.stderr
        assert "0.5 here" in result.stderr
        assert "Traceback" not in result.stderr
        assert digest(run / "metrics.json") == before

    def test_an_unfinished_run_is_refused_with_the_command_that_finishes_it(self, run: Path, tmp_path: Path) -> None:
        shutil.copytree(run, tmp_path / "run")
        for stage in ("evaluate", "deliver"):
            (tmp_path / "run" / "stages" / f"{stage}.json").unlink()
        for name in FILES:
            (tmp_path / "run" / name).unlink(missing_ok=True)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        result = distill_again(tmp_path, "stage=deliver", "run=run")
        assert result.returncode != 0
        assert "its stage evaluate is not complete" in result.stderr
        assert f"python -m distill run={tmp_path / 'run'}" in result.stderr
        assert "Traceback" not in result.stderr
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
        finished = distill_again(tmp_path, f"run={tmp_path / 'run'}")
        assert finished.returncode == 0, finished.stderr
        assert (tmp_path / "run" / "student.pt2").exists()

    def test_without_a_run_there_is_nothing_to_deliver(self, tmp_path: Path) -> None:
        result = torchrun("stage=deliver", "run.dir=nowhere", cwd=tmp_path, ranks=1)
        assert result.returncode != 0
        assert "expected the directory of a finished run" in result.stderr
        assert list(tmp_path.iterdir()) == []


def distill_again(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m distill` with these arguments alone: all the rest is the run's."""
    command = [sys.executable, "-m", "distill", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def kept_files(run: Path) -> list[Path]:
    """The results of all stages before the delivery."""
    weights = [path for path in run.rglob("*.safetensors") if path.name != "student.safetensors"]
    stages = [path for path in (run / "stages").iterdir() if path.stem != "deliver"]
    return sorted([*weights, *stages, run / "ledger.jsonl", run / "identity.json"])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
