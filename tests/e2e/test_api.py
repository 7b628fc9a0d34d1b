"""The library: the same job as the program's, called in this process; and what docs/api.md shows."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import distill
from distill.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
SMALL = (
    "distill.steps=6", "finetune.epochs=1", "assemble.batchnorm_batches=2", "plan.cost=flops", "deploy.programs=[]",
)  # fmt: skip


class Small(nn.Module):
    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def images(count: int = 120, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % 4)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def test_a_network_and_loaders_at_hand_become_a_student(model: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    root = logging.getLogger("distill")
    logged, threads = (root.level, root.propagate, list(root.handlers)), torch.get_num_threads()
    overrides = (*SMALL, "finetune.sparsity=0.5")
    made = distill.compress(
        model, DataLoader(images(), batch_size=16), images(40, seed=1), overrides=overrides, run_dir=tmp_path / "run"
    )
    assert made.metrics["student"]["params"] < made.metrics["teacher"]["params"]
    assert made.metrics["data"]["test_images"] == 40
    assert made.student(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    assert not made.student.training
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (root.level, root.propagate, list(root.handlers)) == logged
    assert torch.get_num_threads() == threads
    again = distill.compress(
        model, DataLoader(images(), batch_size=16), images(40, seed=1), overrides=overrides, run_dir=tmp_path / "run"
    )
    assert all(torch.equal(a, b) for a, b in zip(again.student.parameters(), made.student.parameters(), strict=True))
    assert distill.report(made.run_dir) == made.run_dir / "report.html"
    other = images(seed=2)
    with pytest.raises(distill.errors.DistillError, match=r"data\.factory"):
        distill.compress(model, other, images(40, seed=1), overrides=overrides, run_dir=tmp_path / "run")
    _is_half_zeros(made)


def _is_half_zeros(made: distill.Result) -> None:
    """Assert that half of the matrices' weights are zero, and that the packed file has the same student."""
    weights = [weight for weight in made.student.parameters() if weight.dim() > 1]
    sizes, zeros = (
        sum(map(int, counts)) for counts in zip(*((w.numel(), (w == 0).sum()) for w in weights), strict=True)
    )
    assert abs(zeros / sizes - 0.5) < 0.01
    told, packed = made.metrics["student"], made.run_dir / "student.packed.safetensors"
    assert told["nonzero_params"] == told["params"] - zeros
    assert told["packed_bytes"] == packed.stat().st_size
    assert told["delivered"] == "finetuned"
    assert made.metrics["finetune"]["epochs"][-1]["complete"]
    state = distill.load_packed(packed)
    assert all(torch.equal(state[name], tensor) for name, tensor in made.student.state_dict().items())
    student = distill.load_student(packed, factory=Small)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(student(x), made.student(x))


def test_arguments_that_cannot_be_used_are_refused_by_name(model: nn.Module, tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[tuple[Tensor, int]]):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            return iter(())

    with pytest.raises(ConfigError, match="train, test: got 'Stream'"):
        distill.compress(model, Stream())
    flat: Dataset[tuple[Tensor, ...]] = TensorDataset(torch.rand(20, 3), torch.zeros(20, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"train: got .*3,"):
        distill.compress(model, flat)
    with pytest.raises(ConfigError, match=r"distill\.stpes"):
        distill.compress(model, images(), overrides=["distill.stpes=3"], run_dir=tmp_path / "run")


def test_a_network_is_cut_into_blocks(model: nn.Module) -> None:
    chain = distill.cut(model, torch.rand(2, 3, 8, 8), granularity="conv")
    assert [block.name for block in chain.blocks] == ["stem.0", "body.0", "head"]
    with pytest.raises(ConfigError, match="granularity: got 'fine'"):
        distill.cut(model, torch.rand(2, 3, 8, 8), granularity="fine")


def test_the_examples_of_the_page_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    exec(compile(program, str(PAGE), "exec"), {})
    assert (tmp_path / "outputs").is_dir()
    assert os.listdir(tmp_path / "outputs")
