"""The first paper's experiments as they are composed: blocks, recipe, optimizer and budgets."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from distill.blocks.cut import HookedChain, TracedChain
from distill.config.choices import AugmentName, OptimizerName, Schedule
from distill.config.compose import compose
from distill.config.schema import JobConfig
from distill.job.blocks import cut_blocks
from distill.job.teacher import architecture_of
from distill.job.trainers import step_budget, trainer_options
from distill.teachers import build_architecture
from distill.training.optim import make_optimizer
from tests.documents import fenced


@dataclass(frozen=True)
class SetUp:
    """What a file must say; the number of steps is for a training set of `images` of which one is held out."""

    pixels: int
    batch: int
    classes: int
    images: int
    steps: int
    convolutions: int
    strided: int


SET_UPS = {
    "paper_vgg16_cifar10": SetUp(32, 256, 10, 50_000, 30 * 195, 13, 0),
    "paper_resnet50_cifar10": SetUp(64, 256, 10, 50_000, 30 * 195, 16, 3),
    "paper_resnet50_imagenet": SetUp(224, 32, 1000, 1_281_167, 30 * 1563, 16, 3),
}


@pytest.fixture(scope="module", params=sorted(SET_UPS))
def case(request: pytest.FixtureRequest) -> tuple[JobConfig, SetUp]:
    overrides = [f"experiment={request.param}"]
    if SET_UPS[request.param].classes == 1000:
        overrides.append("data.root=/images")
    return compose(overrides), SET_UPS[request.param]


def test_the_line_for_four_gpus_of_one_host_composes() -> None:
    lines = [line for block in fenced("docs/paper.md", "sh") for line in block.splitlines()]
    _, found = (line for line in ["", *lines] if not line.startswith("sbatch "))
    head, _, overrides = found.partition(" -m distill ")
    assert head == "torchrun --nproc-per-node=4"
    assert compose(shlex.split(overrides)).run.name in SET_UPS


def test_images_batches_and_budgets_are_the_papers(case: tuple[JobConfig, SetUp]) -> None:
    config, wanted = case
    assert (config.data.image_size, config.data.batch_size) == (wanted.pixels, wanted.batch)
    dataset = SimpleNamespace(steps_per_epoch=(wanted.images - 1) // wanted.batch)
    assert step_budget(config, dataset) == wanted.steps  # type: ignore[arg-type]
    assert config.data.augment is not AugmentName.none
    assert (config.finetune.epochs, config.finetune.soft_weight) == (10, 0.0)


def test_every_block_is_trained_by_rmsprop_on_the_squared_error_at_one_rate(case: tuple[JobConfig, SetUp]) -> None:
    config, _ = case
    assert config.distill.optimizer is OptimizerName.rmsprop
    assert config.distill.loss == "mse"
    assert config.distill.schedule is Schedule.constant
    assert config.distill.lr == 2e-3
    optimizer = make_optimizer(
        torch.nn.Linear(1, 1), budget=2, options=trainer_options(config), device=torch.device("cpu")
    )
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert [(group["lr"], group["alpha"]) for group in optimizer.param_groups] == [(2e-3, 0.9)]


def test_every_3x3_convolution_is_a_block_of_its_own(case: tuple[JobConfig, SetUp]) -> None:
    config, wanted = case
    assert config.student.recipe == "separable_x2"
    device = torch.device("meta")  # shapes alone: no weights are drawn, no image is computed
    with device:
        teacher = build_architecture(**architecture_of(config, wanted.classes))
    blocks = cut_blocks(config, (3, wanted.pixels, wanted.pixels), teacher, device)
    all_3x3 = [
        path
        for path, module in teacher.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    assert len(all_3x3) == wanted.convolutions
    larger = ["features.0"] if wanted.convolutions == 13 else []  # 3 channels: its replacement would be larger
    assert blocks.replaced_paths == [path for path in all_3x3 if path not in larger]
    assert all(len(one.recipe.paths(one.changes)) == 1 for one in blocks.candidates.values())
    strides = [teacher.get_submodule(path).stride for path in all_3x3]
    assert strides.count((2, 2)) == wanted.strided
    assert type(blocks.chain) is (TracedChain if wanted.convolutions == 13 else HookedChain)
    assert {boundary.shape[0] for boundary in blocks.chain.boundaries} == {wanted.batch}
