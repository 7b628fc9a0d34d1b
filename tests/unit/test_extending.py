"""The examples of docs/extending, each against the checks of the interface that it is for."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.config.compose import compose
from distill.config.outside import DOORS, TEACHER
from distill.data import Augment, Batch
from distill.data.items import describe
from distill.job.blocks import cut_blocks
from distill.job.teacher import build_teacher
from distill.planning.costs import Costs, Span
from distill.planning.plan import STRATEGIES, Plan
from distill.planning.strategies.choice import rank_plans
from distill.profiling.flops import module_flops
from distill.recipes import View
from distill.simulation.simulator import simulate
from distill.storage.checkpoint import CheckpointFolder
from distill.training.finetune import FitOptions, fit
from distill.training.losses import block_loss, refuse_unusable_loss
from distill.training.objective import TeacherHere
from distill.training.objectives.making import make_objective, try_out
from distill.training.team import Team
from tests.documents import ROOT, Example, example, fenced
from tests.opened import opened
from tests.stripes import COUNT, write_stripes
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
    assert group in {door.group for door in (*DOORS, TEACHER)}
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
    name = "dealt"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    strategy = import_module(name).RoundRobin()
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


def test_the_data_set_gives_batches_by_address(bring: Bring, tmp_path: Path) -> None:
    factory, options = bring("data_set").name, {"root": str(write_stripes(tmp_path / "arrays", 16))}
    assert describe(factory, options, train=True).startswith(f"{COUNT['train']} items, content ")
    one, other = (
        opened("custom", factory=factory, options=options, augment=Augment.none, num_workers=workers)
        for workers in (0, 1)
    )
    assert (one.classes, one.num_test) == (("lying", "standing"), COUNT["test"])
    for step in (0, 7):
        (found,), (again,) = (list(data.train_batches(step, step + 1)) for data in (one, other))
        assert torch.equal(found.images, again.images), "whichever process reads them"
        assert found.images.shape == (32, 3, 16, 16)
        lying, standing = (found.images.mean((1, dim)).std(1) for dim in (3, 2))
        assert torch.equal(standing > lying, found.labels == 1)


def test_the_teacher_is_cut_and_the_recipe_changes_all_of_its_blocks(bring: Bring) -> None:
    factory, recipe = bring("teacher").name, bring("recipe").name
    named = (f"teacher.factory={factory}", "teacher.options.width=8", f"student.recipe={recipe}")
    config = compose(["teacher=custom", *named, "student.options.ratio=0.25", "blocks.granularity=residual"])
    shape = (3, 16, 16)
    teacher = build_teacher(config, opened(), CPU)
    blocks = cut_blocks(config, shape, teacher, CPU)
    assert blocks.remarks == ()
    assert len(blocks.replaced_paths) == 12, "two convolutions of each of six blocks"
    kept = blocks.chain.run(torch.randn(2, *shape), last=7, keep=range(8))
    for number, one in blocks.candidates.items():
        block = blocks.chain.block_module(one.input)
        student = blocks.build(number, torch.Generator().manual_seed(0))
        view = View(one.name, block, kept[one.input], (), frozenset(), None)
        cost = one.recipe.cost(view, one.changes)
        assert cost.params == sum(parameter.numel() for parameter in student.parameters())
        assert cost.flops == module_flops(student.eval(), kept[one.input][:1])
        full = replace(one.recipe, ratio=1.0).student(block, one.changes, torch.Generator())
        torch.testing.assert_close(full.eval()(kept[one.input]), kept[one.target], rtol=1e-3, atol=1e-4)
