"""End-to-end training: resumed after any epoch it ends in the bits of one go, and several ranks train as one would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distill.checkpoint import CheckpointFolder
from distill.data import Batch
from distill.finetune import FitOptions, Team, fit, label_loss
from tests.dist.ranks import TIMEOUT_S, connect, run_ranks

STEPS, ROWS, CLASSES = 3, 4, 2


class Images:
    """As much of a data set as fit() asks for: batches by step, and which were asked for."""

    steps_per_epoch = STEPS

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, int]] = []

    def train_batches(self, start: int, stop: int, part: int = 0, num_parts: int = 1) -> Iterator[Batch]:
        self.asked.append((start, stop, part, num_parts))
        for step in range(start, stop):
            images = torch.randn(ROWS, 3, 2, 2, generator=torch.Generator().manual_seed(step))
            rows = slice(part, None, num_parts)
            yield Batch(images[rows], (torch.arange(ROWS) % CLASSES)[rows])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))


def train(folder: Path, images: Images, *, team: Team | None = None, stop_after: int | None = None) -> nn.Module:
    """Train a fresh network for three epochs; an attempt may be stopped after some."""
    model = network()

    def report(epoch: int, *_: float) -> None:
        if epoch == stop_after:
            raise KeyboardInterrupt

    options = FitOptions(epochs=3, lr=0.5, weight_decay=0.01, warmup_epochs=1.0)
    fit(
        model,
        images,  # type: ignore[arg-type]
        label_loss,
        options=options,
        team=team or Team(),
        device=torch.device("cpu"),
        checkpoints=CheckpointFolder(folder, generation=1),
        name="finetune",
        report=report,
    )
    return model


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_after_any_epoch_the_weights_are_those_of_one_go(tmp_path: Path, stop_after: int) -> None:
    whole = train(tmp_path / "whole", Images()).state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", Images(), stop_after=stop_after)
    images = Images()
    resumed = train(tmp_path / "resumed", images).state_dict()
    assert images.asked == [(STEPS * epoch, STEPS * (epoch + 1), 0, 1) for epoch in range(stop_after, 3)]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not all(torch.equal(tensor, whole[name]) for name, tensor in network().state_dict().items())


def rank(rank: int, world_size: int, environment: Mapping[str, str], folder: str) -> None:
    control, images = connect(rank, world_size, environment), Images()
    store = control.store_for("finetune")
    team = Team(rank=rank, world_size=world_size, store=store, timeout_s=TIMEOUT_S)
    model = train(Path(folder) / str(rank), images, team=team)
    assert images.asked == [(STEPS * epoch, STEPS * (epoch + 1), rank, world_size) for epoch in range(3)]
    save_file(model.state_dict(), Path(folder) / f"{rank}.safetensors")
    control.leave()


def test_two_ranks_train_as_one_would_and_the_first_keeps_the_checkpoint(tmp_path: Path) -> None:
    run_ranks(rank, 2, str(tmp_path))
    alone = train(tmp_path / "alone", Images()).state_dict()
    for number in (0, 1):
        found = load_file(tmp_path / f"{number}.safetensors")
        assert all(torch.allclose(found[name], alone[name], rtol=1e-5, atol=1e-6) for name in alone)
    assert [*(tmp_path / "0").rglob("*.safetensors")]
    assert not [*(tmp_path / "1").rglob("*.safetensors")]
