"""The first paper's experiments as docs/paper.md starts them, two steps long, stand-in images and random teachers."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import distill as package
from distill.teachers import build_architecture
from tests.documents import ROOT, fenced
from tests.e2e.command import bits, distill, metrics

pytestmark = pytest.mark.jobs

CLASSES = ("cat", "dog")
TRAIN_IMAGES, TEST_IMAGES = 5, 2  # of each class


def write_images(root: Path, *, pixels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", TEST_IMAGES)):
        for label in CLASSES:
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(256, (pixels, pixels, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(folder / f"{index}.png")


def documented(experiment: str) -> list[str]:
    """The overrides of the line of docs/paper.md that submits the experiment to four nodes with one GPU each."""
    lines = [line for block in fenced("docs/paper.md", "sh") for line in block.splitlines()]
    head = "sbatch --nodes=4 --gpus-per-node=1 slurm/distill.sbatch "
    (found,) = (line for line in lines if line.startswith(head) and f"experiment={experiment} " in line)
    header = (ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text()
    assert f"#   {found}\n" in header, "the file's own header says another line"
    return shlex.split(found.removeprefix(head))


@dataclass(frozen=True)
class Case:
    """An experiment, its teacher, and a batch that keeps the test short."""

    experiment: str
    source: str
    name: str
    pixels: int
    batch: int
    blocks: int
    raw_pixels: int


CASES = [
    Case("paper_vgg16_cifar10", "cifar", "cifar_vgg16", pixels=32, batch=4, blocks=12, raw_pixels=32),
    Case("paper_resnet50_cifar10", "torchvision", "resnet50", pixels=64, batch=4, blocks=16, raw_pixels=32),
    Case("paper_resnet50_imagenet", "torchvision", "resnet50", pixels=224, batch=2, blocks=16, raw_pixels=240),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.experiment)
def test_an_experiment_of_the_paper_runs_to_a_delivered_student_on_two_ranks(tmp_path: Path, case: Case) -> None:
    write_images(tmp_path / "images", pixels=case.raw_pixels)
    torch.manual_seed(0)
    teacher = build_architecture(source=case.source, name=case.name, num_classes=len(CLASSES))
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    run_dir = tmp_path / "run"
    result = distill(
        *documented(case.experiment),
        "data.name=imagefolder",
        f"data.root={tmp_path / 'images'}",
        f"data.image_size={case.pixels}",
        f"data.batch_size={case.batch}",
        "data.num_workers=0",
        f"teacher.weights={tmp_path / 'teacher.safetensors'}",
        "teacher.fit.epochs=0",
        "distill.epochs=null",
        "distill.steps=2",
        "assemble.batchnorm_batches=0",
        f"run.dir={run_dir}",
        cwd=tmp_path,
        ranks=2,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = metrics(run_dir)
    assert [block["steps"] for block in found["blocks"]] == [2] * case.blocks
    assert 1 in {block["rank"] for block in found["blocks"]}, "no boundary travelled"
    assert all(block["status"] == "finished" for block in found["blocks"])
    assert found["data"]["test_images"] == TEST_IMAGES * len(CLASSES)
    assert len(found["finetune"]["epochs"]) == 1
    assert found["student"]["replaced_params"] < found["teacher"]["replaced_params"]
    student = package.load_student(run_dir)
    with torch.no_grad():
        assert student(torch.zeros(1, 3, case.pixels, case.pixels)).shape == (1, len(CLASSES))


def test_blocks_inside_units_have_the_same_bits_on_one_rank_and_on_two(tmp_path: Path) -> None:
    inside = ("blocks.granularity=modules", "blocks.modules=[layer*.*.conv2]", "stage=distill")
    for ranks in (1, 2):
        result = distill(*inside, f"run.dir={tmp_path / str(ranks)}", cwd=tmp_path, ranks=ranks)
        assert result.returncode == 0, result.stdout + result.stderr
    alone = bits(tmp_path / "1")
    assert len(alone) == len(set(alone.values())) == 9
    assert bits(tmp_path / "2") == alone
