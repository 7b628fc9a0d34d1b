"""End-to-end training: resumed after any epoch it ends in the bits of one go, and several ranks train as one would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.data import Batch
from distill.errors import DistillError
from distill.storage.checkpoint import CheckpointFolder
from distill.training.finetune import Epoch, FitOptions, Team, fit, label_loss
from distill.training.shared_norms import SharedStatistics
from tests.dist.ranks import TIMEOUT_S, connect, run_ranks

STEPS, ROWS, CLASSES = 3, 5, 2  # five rows: two ranks have three and two of them


class Images:
    """As much of a data set as fit() asks for: batches by step, and which were asked for."""

    steps_per_epoch, batch_size = STEPS, ROWS

    def __init__(self, spoilt_step: int | None = None) -> None:
        self.asked: list[tuple[int, int, int, int]] = []
        self.spoilt_step = spoilt_step

    def train_batches(self, start: int, stop: int, part: int = 0, num_parts: int = 1) -> Iterator[Batch]:
        self.asked.append((start, stop, part, num_parts))
        for step in range(start, stop):
            images = torch.randn(ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            if step == self.spoilt_step:
                images[0] = math.nan
            rows = slice(part, None, num_parts)
            yield Batch(images[rows].to(memory_format=torch.channels_last), (torch.arange(ROWS) % CLASSES)[rows])


class Plain(nn.Module):
    """Layers in a row, the second a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class Activated(nn.BatchNorm2d):
    """A batch norm of somebody else's, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum)
        return F.silu(x)


class Norms(nn.Module):
    """Norms of every kind: over three dimensions and one, without parameters or memory, cumulative, frozen, twice the
    same, of instances."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 18, 1)
        self.volume = nn.BatchNorm3d(6, momentum=None)
        self.activated = Activated(18)
        self.shared = nn.BatchNorm2d(18, affine=False)
        self.instances = nn.InstanceNorm2d(18, track_running_stats=True, affine=True)
        self.forgetful = nn.BatchNorm2d(18, track_running_stats=False)
        self.of_many = nn.SyncBatchNorm(18)
        self.frozen = nn.BatchNorm2d(18)
        self.flat = nn.BatchNorm1d(18)
        self.head = nn.Linear(18, CLASSES)

    def train(self, mode: bool = True) -> Norms:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = self.volume(self.start(images).unflatten(1, (6, 3))).flatten(1, 2)
        x = self.shared(self.activated(x) + self.shared(x.tanh()))
        x = self.frozen(self.of_many(self.forgetful(self.instances(x)).sigmoid()))
        return self.head(self.flat((x * x).mean((2, 3))))


class Partial(nn.Module):
    """A layer that is never used, one whose output is thrown away, and one that is used in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.sometimes = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.norm_sometimes = nn.BatchNorm2d(4)
        self.head, self.unused, self.in_vain = (nn.Linear(4, CLASSES) for _ in range(3))
        self.used = 0

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.first(images))
        if self.training and torch.rand(()) < 0.5:
            x = self.norm_sometimes(self.sometimes(x))
            self.used += 1
        x = x.relu().mean((2, 3))
        self.in_vain(x)
        return self.head(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"plain": Plain, "norms": Norms, "partial": Partial}


def network(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[kind]()


def train(
    folder: Path,
    images: Images,
    *,
    model: nn.Module | None = None,
    team: Team | None = None,
    stop_after: int | None = None,
    lr: float = 0.1,
) -> tuple[nn.Module, list[Epoch]]:
    """Train a fresh network for three epochs; an attempt may be stopped after some."""
    model = model or network()

    def report(course: Sequence[Epoch]) -> None:
        course[-1]["added"] = 10 * len(course)

    options = FitOptions(epochs=3, lr=lr, weight_decay=0.01, warmup_epochs=1.0)
    checkpoints = StoppingFolder(folder, generation=1)
    checkpoints.stop_after = stop_after
    course = fit(
        model,
        images,  # type: ignore[arg-type]
        label_loss,
        options=options,
        team=team or Team(),
        device=torch.device("cpu"),
        seed=5,
        checkpoints=checkpoints,
        name="finetune",
        report=report,
    )
    return model, course


class StoppingFolder(CheckpointFolder):
    """Ends the attempt once the checkpoint of an epoch is written."""

    stop_after: int | None

    def save(self, checkpoint) -> None:  # type: ignore[no-untyped-def]
        super().save(checkpoint)
        if checkpoint.step == self.stop_after:
            raise KeyboardInterrupt


def without_times(course: list[Epoch]) -> list[Epoch]:
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in course]


class Dropping(Plain):
    """Draws random numbers."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.body(images), 0.5, self.training))


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_after_any_epoch_weights_and_records_are_those_of_one_go(tmp_path: Path, stop_after: int) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return Dropping()

    model, expected = train(tmp_path / "whole", Images(), model=fresh())
    whole = model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", Images(), model=fresh(), stop_after=stop_after)
    images = Images()
    resumed, course = train(tmp_path / "resumed", images, model=fresh())
    assert images.asked == [(STEPS * epoch, STEPS * (epoch + 1), 0, 1) for epoch in range(stop_after, 3)]
    assert all(torch.equal(resumed.state_dict()[name], whole[name]) for name in whole)
    assert without_times(course) == without_times(expected)
    assert [epoch["added"] for epoch in course] == [10, 20, 30]
    assert not all(torch.equal(tensor, whole[name]) for name, tensor in fresh().state_dict().items())


def test_an_epoch_without_a_finite_loss_is_the_last_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    _, course = train(tmp_path, Images(spoilt_step=STEPS + 1))
    assert [epoch["loss"] is None for epoch in course] == [False, True]
    _, again = train(tmp_path, Images(spoilt_step=STEPS + 1))
    assert without_times(again) == without_times(course)


def rank(rank: int, world_size: int, environment: Mapping[str, str], folder: str) -> None:
    control = connect(rank, world_size, environment)
    for kind in NETWORKS:
        images, place = Images(), Path(folder) / kind
        store = control.store_for(f"finetune {kind}")
        team = Team(rank=rank, world_size=world_size, store=store, timeout_s=TIMEOUT_S)
        model, course = train(place / str(rank), images, model=network(kind), team=team)
        assert images.asked == [(STEPS * epoch, STEPS * (epoch + 1), rank, world_size) for epoch in range(3)]
        save_file(
            model.state_dict(),
            place / f"{rank}.safetensors",
            {"losses": json.dumps([epoch["loss"] for epoch in course])},
        )
    control.leave()


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All networks, trained by two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind in NETWORKS:
        (folder / kind).mkdir()
    run_ranks(rank, 2, str(folder))
    return folder


@pytest.mark.parametrize("kind", NETWORKS)
def test_two_ranks_train_as_one_would(shared_out: Path, tmp_path: Path, kind: str) -> None:
    """Rows that the ranks cannot share out evenly; batch norms whose statistics are those of all of them."""
    model, course = train(tmp_path / "alone", Images(), model=network(kind))
    alone = model.state_dict()
    first, second = (load_file(shared_out / kind / f"{number}.safetensors") for number in range(2))
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert all(torch.equal(first[name], second[name]) for name in first), "the same bits on every rank"
    with safe_open(shared_out / kind / "1.safetensors", framework="pt") as file:
        losses = json.loads(file.metadata()["losses"])
    assert losses == pytest.approx([epoch["loss"] for epoch in course], rel=1e-4)
    if isinstance(model, Partial):
        assert 0 < model.used < 3 * STEPS
        assert torch.equal(alone["unused.weight"], network(kind).state_dict()["unused.weight"]), "not even decayed"
        assert torch.equal(first["in_vain.weight"], alone["in_vain.weight"])


def test_the_first_rank_alone_keeps_a_checkpoint(shared_out: Path) -> None:
    assert [*(shared_out / "plain" / "0").rglob("*.safetensors")]
    assert not [*(shared_out / "plain" / "1").rglob("*.safetensors")]


def test_ranks_at_different_layers_are_told_and_not_mixed_up() -> None:
    norms = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    images = torch.randn(3, 2, 2, 2)
    sent: list[Tensor] = []
    with SharedStatistics(lambda tensor: sent.append(tensor) or tensor[None], norms):  # type: ignore[func-returns-value]
        norms[0](images)
    with (
        SharedStatistics(lambda tensor: torch.stack([tensor, sent[0]]), norms),
        pytest.raises(DistillError, match="the ranks went different ways through the network"),
    ):
        norms[1](images)
