"""End-to-end training: resumed after any epoch it ends in the bits of one go, and several ranks train as one would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
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
from distill.training.averaged import Averaged
from distill.training.companions import Companion
from distill.training.finetune import Epoch, FitOptions, fit
from distill.training.horizon import Horizon, usual_rate
from distill.training.objective import (
    Address,
    Labels,
    Objective,
    Outputs,
    Seen,
    TeacherHere,
    TeacherOutputs,
)
from distill.training.objectives.entropy_temperature import EntropyTemperature
from distill.training.objectives.fading_features import FadingFeatures
from distill.training.objectives.making import try_out
from distill.training.precision import in_bf16
from distill.training.shared_norms import SharedStatistics
from distill.training.team import Computing, Team
from tests.dist.ranks import TIMEOUT_S, connect, run_ranks

STEPS, ROWS, CLASSES = 3, 5, 2  # five rows: two ranks have three and two of them


class Images:
    """As much of a data set as fit() asks for: batches by step, and which were asked for."""

    steps_per_epoch, batch_size = STEPS, ROWS

    def __init__(self, spoilt_step: int | None = None, times_spoilt: int = 99) -> None:
        self.asked: list[tuple[int, int, int, int]] = []
        self.spoilt_step, self.times_spoilt = spoilt_step, times_spoilt

    def train_batches(self, start: int, stop: int, part: int = 0, num_parts: int = 1) -> Iterator[Batch]:
        self.asked.append((start, stop, part, num_parts))
        for step in range(start, stop):
            images = torch.randn(ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            if step == self.spoilt_step and self.times_spoilt > 0:
                self.times_spoilt -= 1
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


class Adversarial(Labels):
    """Labels, and a critic that tells the student's activation from the teacher's; it has an optimizer of its own."""

    taps = ("body",)

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = weight
        self.critic = nn.Sequential(nn.LazyLinear(8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.unused = nn.Linear(2, 2)

    def forward(self, seen: Seen) -> Tensor:
        return super().forward(seen) - self.weight * self.critic(seen.student.taps["body"]).mean()

    def own_loss(self, seen: Seen) -> Tensor:
        assert not seen.student.taps["body"].requires_grad
        student, teacher = self.critic(seen.student.taps["body"]), self.critic(seen.teacher.taps["body"])
        return F.softplus(student).mean() + F.softplus(-teacher).mean()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Joint(Labels):
    """Labels, and a head that learns together with the student to give the teacher's activation."""

    taps = ("body",)

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        self.head = nn.Linear(student.taps["body"].shape[1], teacher.taps["body"].shape[1])

    def forward(self, seen: Seen) -> Tensor:
        return super().forward(seen) + F.mse_loss(self.head(seen.student.taps["body"]), seen.teacher.taps["body"])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain, "norms": Norms, "partial": Partial, "adversarial": Plain, "joint": Plain, "fading": Plain,
    "bf16": Plain,
}  # fmt: skip
COMPUTING: dict[str, Computing] = {"bf16": partial(in_bf16, torch.device("cpu"))}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "adversarial": Adversarial,
    "joint": Joint,
    "fading": lambda: FadingFeatures(EntropyTemperature(soft_weight=0.5), ["body"], weight=1.0),
}


def network(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[kind]()


def objective(kind: str, student: nn.Module, teacher: nn.Module) -> Objective:
    torch.manual_seed(1)
    made = OBJECTIVES.get(kind, Labels)()
    sample = next(Images().train_batches(0, 1))
    try_out(made, kind, student=student.eval(), teacher=teacher, batch=sample)
    return made


def train(
    folder: Path,
    images: Images,
    *,
    model: nn.Module | None = None,
    kind: str = "plain",
    in_eval: Sequence[str] = (),
    source: Callable[[nn.Module], TeacherOutputs] | None = None,
    team: Team | None = None,
    stop_after: int | None = None,
    lr: float | None = 0.1,
    epochs: float = 3,
    setbacks: int = 0,
    companions: Sequence[Companion] = (),
    horizon: Horizon | None = None,
    look: Callable[[Sequence[Epoch]], object] = lambda _: None,
) -> tuple[nn.Module, list[Epoch]]:
    """Train a fresh network, for three epochs unless said otherwise; an attempt may be stopped after some."""
    model = model or network(kind)
    torch.manual_seed(2)
    teacher = NETWORKS[kind]().eval()
    made = objective(kind, model, teacher)

    def report(course: Sequence[Epoch]) -> None:
        course[-1]["added"] = 10 * len(course)
        look(course)

    options = FitOptions(epochs=epochs, lr=lr, weight_decay=0.01, warmup_epochs=1.0, setbacks=setbacks)
    checkpoints = StoppingFolder(folder, generation=1)
    checkpoints.stop_after = stop_after
    course = fit(
        model,
        images,  # type: ignore[arg-type]
        made,
        teacher=source(teacher) if source else TeacherHere(teacher, made.taps),
        in_eval=in_eval,
        companions=companions,
        horizon=horizon,
        computing=COMPUTING.get(kind, nullcontext),
        options=options,
        team=team or Team(),
        device=torch.device("cpu"),
        seed=5,
        checkpoints=checkpoints,
        name="finetune",
        report=report,
    )
    assert not any(module._forward_hooks for module in (*model.modules(), *teacher.modules()))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(made.state_dict(), folder / "objective.pt")
    return model, course


def test_the_last_epoch_may_be_a_part_of_one(tmp_path: Path) -> None:
    images = Images()
    model, course = train(tmp_path, images, epochs=1 + 1 / STEPS)
    assert images.asked == [(0, STEPS, 0, 1), (STEPS, STEPS + 1, 0, 1)]
    assert [epoch["epoch"] for epoch in course] == [1, 2]
    assert all(math.isfinite(epoch["loss"]) for epoch in course)
    other, _ = train(tmp_path / "whole", Images(), epochs=2)
    assert not torch.equal(model.state_dict()["head.weight"], other.state_dict()["head.weight"])


def test_few_steps_have_a_lower_rate_and_many_the_usual_one() -> None:
    assert usual_rate(100) == pytest.approx(0.02 / math.sqrt(8))
    assert usual_rate(800) == usual_rate(100_000) == 0.02


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


def test_a_weight_that_fades_goes_on_from_where_it_was(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", Images(), kind="fading")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", Images(), kind="fading", stop_after=1)
    resumed, _ = train(tmp_path / "resumed", Images(), kind="fading")
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_an_epoch_without_a_finite_loss_is_the_last_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    _, course = train(tmp_path, Images(spoilt_step=STEPS + 1))
    assert [epoch["loss"] is None for epoch in course] == [False, True]
    _, again = train(tmp_path, Images(spoilt_step=STEPS + 1))
    assert without_times(again) == without_times(course)


def test_after_a_loss_that_is_not_finite_the_last_epoch_is_gone_back_to_at_half_the_rate(tmp_path: Path) -> None:
    spoilt = Images(spoilt_step=STEPS + 1, times_spoilt=2)
    model, course = train(tmp_path / "spoilt", spoilt, setbacks=3)
    assert [epoch["loss"] is None for epoch in course] == [False, False, False]
    assert [epoch.get("setbacks") for epoch in course] == [
        None, [{"step": 2 * STEPS, "lr": 0.1}, {"step": 2 * STEPS, "lr": 0.05}], None
    ]  # fmt: skip
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert spoilt.asked[1:4] == [(STEPS, 2 * STEPS, 0, 1)] * 3
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", Images(STEPS + 1, times_spoilt=2), setbacks=3, stop_after=2)
    resumed, _ = train(tmp_path / "resumed", Images(), setbacks=3)
    assert same(resumed, model), "the halved rate stays after a break"


def test_the_first_epoch_goes_back_to_the_start_and_three_setbacks_are_the_most(tmp_path: Path) -> None:
    _, course = train(tmp_path / "once", Images(spoilt_step=1, times_spoilt=1), setbacks=3)
    assert [len(epoch.get("setbacks", [])) for epoch in course] == [1, 0, 0]
    _, course = train(tmp_path / "always", Images(spoilt_step=1), setbacks=3)
    (epoch,) = course
    assert epoch["loss"] is None
    assert [one["lr"] for one in epoch["setbacks"]] == [0.1, 0.05, 0.025]


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in a.state_dict().items())


class Noted(Companion):
    """Counts, in a tensor of its own, and lets weights of nought be judged."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, torch.zeros(())
        self.calls: list[tuple[str, int, int, bool]] = []

    def before_step(self, step: int, total: int) -> None:
        self.before = self.model.get_parameter("head.weight").detach().clone()
        known = self.model.get_parameter("head.weight").grad is not None
        self.calls.append(("before", step, total, known))

    def after_step(self, step: int, total: int) -> None:
        changed = not torch.equal(self.before, self.model.get_parameter("head.weight"))
        self.calls.append(("after", step, total, changed))
        self.seen += 1

    @contextmanager
    def judged(self) -> Iterator[None]:
        weight = self.model.get_parameter("head.weight").data
        kept = weight.clone()
        weight.zero_()
        yield
        weight.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.seen = state["seen"].clone()


def test_companions_see_every_step_say_what_is_judged_and_are_checkpointed(tmp_path: Path) -> None:
    def companion() -> tuple[nn.Module, Noted]:
        model = network()
        return model, Noted(model)

    def nought(model: nn.Module) -> bool:
        return not model.get_parameter("head.weight").any()

    model, noted = companion()
    judged: list[bool] = []
    train(tmp_path / "whole", Images(), model=model, companions=[noted], look=lambda _: judged.append(nought(model)))
    steps = [(name, step, 3 * STEPS, True) for step in range(3 * STEPS) for name in ("before", "after")]
    assert noted.calls == steps
    assert judged == [True] * 3
    assert nought(model), "the network ends as it is judged"
    resumed, other = companion()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", Images(), model=resumed, companions=[other], stop_after=2)
    resumed, other = companion()
    train(tmp_path / "resumed", Images(), model=resumed, companions=[other])
    assert other.seen == 3 * STEPS
    assert len(other.calls) == 2 * STEPS
    assert same(resumed, model)


def test_averaged_weights_of_passes_in_bf16_resume_in_the_bits_of_one_go(tmp_path: Path) -> None:
    def go(folder: Path, stop_after: int | None = None) -> nn.Module:
        model = network()
        averaged = [Averaged(model, 0.9)]
        train(folder, Images(), model=model, kind="bf16", companions=averaged, stop_after=stop_after)
        return model

    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "resumed", stop_after=2)
    assert same(go(tmp_path / "resumed"), whole)
    plain, _ = train(tmp_path / "plain", Images(), model=network(), kind="bf16")
    assert not torch.equal(plain.get_parameter("head.weight"), whole.get_parameter("head.weight"))
    assert all(tensor.dtype is not torch.bfloat16 for tensor in whole.state_dict().values())


@pytest.mark.parametrize("revised", [STEPS, 2 * STEPS + 1, 4 * STEPS])
def test_a_horizon_may_be_revised_after_an_epoch_and_is_resumed(tmp_path: Path, revised: int) -> None:
    def go(folder: Path, stop_after: int | None = None) -> tuple[nn.Module, list[Epoch]]:
        horizon = Horizon(3 * STEPS)

        def revise(course: Sequence[Epoch]) -> None:
            if len(course) == 1:
                horizon.total = revised

        return train(folder, Images(), model=network(), horizon=horizon, look=revise, stop_after=stop_after)

    model, course = go(tmp_path / "whole")
    assert [epoch["steps"] for epoch in course] == [*range(STEPS, revised, STEPS), revised]
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "resumed", stop_after=1)
    resumed, again = go(tmp_path / "resumed")
    assert without_times(again) == without_times(course)
    assert same(resumed, model)


def test_the_usual_peak_rate_follows_a_revised_horizon_and_is_resumed(tmp_path: Path) -> None:
    def go(folder: Path, stop_after: int | None = None, *, lr: float | None = None) -> nn.Module:
        horizon = Horizon(STEPS + 1)

        def revise(course: Sequence[Epoch]) -> None:
            horizon.total = 3 * STEPS

        look, more = revise, {"horizon": horizon, "stop_after": stop_after, "lr": lr}
        return train(folder, Images(), model=network(), look=look, **more)[0]  # type: ignore[arg-type]

    model = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "resumed", stop_after=1)
    assert same(go(tmp_path / "resumed"), model)
    assert not same(go(tmp_path / "first estimate", lr=usual_rate(STEPS + 1)), model)


def rank(rank: int, world_size: int, environment: Mapping[str, str], folder: str) -> None:
    control = connect(rank, world_size, environment)
    for kind in NETWORKS:
        images, place = Images(), Path(folder) / kind
        store = control.store_for(f"finetune {kind}")
        team = Team(rank=rank, world_size=world_size, store=store, timeout_s=TIMEOUT_S)
        model, course = train(place / str(rank), images, kind=kind, team=team)
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
    model, course = train(tmp_path / "alone", Images(), kind=kind)
    alone = model.state_dict()
    first, second = (load_file(shared_out / kind / f"{number}.safetensors") for number in range(2))
    rtol, atol = (0.05, 0.01) if kind == "bf16" else (1e-4, 1e-5)
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert all(torch.equal(first[name], second[name]) for name in first), "the same bits on every rank"
    with safe_open(shared_out / kind / "1.safetensors", framework="pt") as file:
        losses = json.loads(file.metadata()["losses"])
    assert losses == pytest.approx([epoch["loss"] for epoch in course], rel=rtol)
    own = [torch.load(path / "objective.pt") for path in (tmp_path / "alone", *(shared_out / kind / n for n in "01"))]
    for name, tensor in own[0].items():
        torch.testing.assert_close(own[1][name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(own[1][name], own[2][name]), "the same bits on every rank"
    if isinstance(model, Partial):
        assert 0 < model.used < 3 * STEPS
        assert torch.equal(alone["unused.weight"], network(kind).state_dict()["unused.weight"]), "not even decayed"
        assert torch.equal(first["in_vain.weight"], alone["in_vain.weight"])


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_objective_with_parameters_resumes_in_the_bits_of_one_go(tmp_path: Path, kind: str) -> None:
    model, _ = train(tmp_path / "whole", Images(), kind=kind)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", Images(), kind=kind, stop_after=2)
    resumed, _ = train(tmp_path / "resumed", Images(), kind=kind)
    labels, _ = train(tmp_path / "labels", Images(), model=network())
    whole, others = model.state_dict(), labels.state_dict()
    assert whole.keys() == others.keys(), "nothing of it stays in the network"
    assert all(torch.equal(resumed.state_dict()[name], whole[name]) for name in whole)
    assert not torch.equal(whole["head.weight"], others["head.weight"])
    own = [torch.load(tmp_path / place / "objective.pt") for place in ("whole", "resumed")]
    assert all(torch.equal(own[0][name], own[1][name]) for name in own[0])


class ByAddress:
    """A source that never sees the batch: it finds what the teacher gave for the rows by their address."""

    def __init__(self, teacher: nn.Module) -> None:
        self._here = TeacherHere(teacher, Joint.taps)

    def outputs(self, batch: Batch, address: Address) -> Outputs:
        batches = Images().train_batches(address.step, address.step + 1, address.part, address.num_parts)
        return self._here.outputs(next(batches), address)


def test_a_source_that_goes_by_addresses_gives_the_same_bits(tmp_path: Path) -> None:
    here, _ = train(tmp_path / "here", Images(), kind="joint")
    by_address, _ = train(tmp_path / "by_address", Images(), kind="joint", source=ByAddress)
    expected = here.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in by_address.state_dict().items())


def test_the_network_s_loss_does_not_move_a_critic(tmp_path: Path) -> None:
    kind = "adversarial"
    start = objective(kind, network(), network()).state_dict()
    train(tmp_path, Images(), kind=kind, lr=0.0)
    end = torch.load(tmp_path / "objective.pt")
    assert not torch.equal(end["critic.0.weight"], start["critic.0.weight"])
    assert torch.equal(end["unused.weight"], start["unused.weight"])


@pytest.mark.parametrize("frozen", [(), ("body.1",)])
def test_a_norm_that_stays_in_eval_keeps_its_statistics(tmp_path: Path, frozen: tuple[str, ...]) -> None:
    model, _ = train(tmp_path, Images(), in_eval=frozen)
    changed = not torch.equal(model.get_buffer("body.1.running_mean"), torch.zeros(4))
    assert changed == (not frozen)
    assert not torch.equal(model.get_parameter("body.1.weight"), torch.ones(4)), "its weights are trained"


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
