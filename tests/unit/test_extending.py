"""The examples of docs/extending, each against the checks of the interface that it is for."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.config.outside import DOORS
from distill.data import Batch
from distill.planning.costs import Costs, Span
from distill.planning.plan import STRATEGIES, Plan
from distill.planning.strategies.choice import rank_plans
from distill.simulation.simulator import simulate
from distill.storage.checkpoint import CheckpointFolder
from distill.training.finetune import FitOptions, Team, fit
from distill.training.losses import block_loss, refuse_unusable_loss
from distill.training.objective import TeacherHere, make_objective, try_out
from tests.documents import ROOT, Example, example, fenced
from tests.training import batch, same_bits, train, trainer

PAGES = sorted(path.stem for path in (ROOT / "docs" / "extending").glob("*.md"))
CPU = torch.device("cpu")

Bring = Callable[[str], Example]


@pytest.fixture
def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bring:
    """Puts a page's example where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda page: example(page).written_to(tmp_path)


def test_every_page_is_linked_and_tested() -> None:
    linked = re.findall(r"\(docs/extending/(\w+)\.md\)", (ROOT / "CONTRIBUTING.md").read_text())
    assert sorted(linked) == PAGES
    here = Path(__file__).read_text()
    assert [page for page in PAGES if f'bring("{page}")' not in here and f"extending/{page}.md" not in here] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "strategy"])
def test_a_package_brings_it_by_an_entry_point_of_a_group_that_is_looked_at(page: str) -> None:
    (toml,) = fenced(f"docs/extending/{page}.md", "toml")
    ((group, points),) = tomllib.loads(toml)["project"]["entry-points"].items()
    assert group in {"distill.teachers", *(door.group for door in DOORS)}
    assert list(points.values()) == [f"my_package.{example(page).name}"]


def test_a_block_trains_with_the_loss(bring: Bring) -> None:
    loss = bring("loss").name
    inputs, target = batch(0, channels_last=True)
    for precision in (torch.float32, torch.bfloat16):
        refuse_unusable_loss(loss, inputs.to(precision), target)
    student, gradients = inputs.clone().requires_grad_() * 1, list[torch.Tensor]()
    student.register_hook(gradients.append)
    block_loss(loss)(student, target).backward()
    assert gradients[0].stride() == target.stride(), "the page says that it keeps channels_last"
    readings = train(trainer(loss=loss, channels_last=True), 12, channels_last=True)
    assert readings[-1].loss < readings[0].loss


class Images:
    """As much of a data set as fit() asks for."""

    steps_per_epoch, batch_size = 3, 4

    def train_batches(self, start: int, stop: int, part: int = 0, num_parts: int = 1) -> list[Batch]:
        return [Batch(batch(step)[0], torch.arange(4) % 2) for step in range(start, stop)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


def test_a_network_is_fine_tuned_for_the_objective(bring: Bring, tmp_path: Path) -> None:
    name = bring("objective").name
    teacher = network().eval().requires_grad_(False)
    states = []
    for weight in (0.0, 100.0):
        settings = {"temperature": 4.0, "soft_weight": 0.5}
        objective = make_objective(name, options={"at": ["1"], "weight": weight}, settings=settings)
        student = network()
        try_out(objective, name, student=student.eval(), teacher=teacher, batch=Images().train_batches(0, 1)[0])
        course = fit(
            student,
            Images(),  # type: ignore[arg-type]
            objective,
            teacher=TeacherHere(teacher, objective.taps),
            options=FitOptions(epochs=2, lr=0.01, weight_decay=0.0),
            team=Team(),
            device=CPU,
            seed=5,
            checkpoints=CheckpointFolder(tmp_path / f"{weight}", generation=1),
            name="finetune",
            report=lambda _: None,
        )
        assert course[-1]["loss"] is not None
        states.append(student.state_dict())
    assert not same_bits(*states)


def test_the_strategy_plans_what_can_be_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,), (command,) = (fenced("docs/extending/strategy.md", language) for language in ("python", "sh"))
    (tmp_path / "dealt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    strategy = import_module("dealt").RoundRobin()
    assert f"plan.strategy={strategy.name} " in command
    monkeypatch.setitem(STRATEGIES, strategy.name, strategy)
    costs = Costs((1.0, 2.0, 1.0), (3.0, 4.0, 2.0), (10, 10, 10, 10), batch_size=8, slowness=(1.0, 2.0))
    plan = strategy.plan(costs, [Span(unit, 0, 5) for unit in range(3)], 2)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.owners == ((0, 2), (1,))
    assert plan.predicted_rank_s == (5 * (4 + 5), 2 * 5 * (3 + 4))
    assert (plan.label, plan.how.flows(plan, costs)) == (strategy.name, [])
    assert all(plan.teaches(rank) for rank in range(2))
    assert simulate(plan, costs).makespan_s == pytest.approx(plan.predicted_makespan_s)
    best = rank_plans([strategy, STRATEGIES["replicate"]], costs, plan.spans, 2)[0]
    assert best.strategy == "replicate"
