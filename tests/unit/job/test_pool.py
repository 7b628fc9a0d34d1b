"""What the blocks of a student may become under budgets, and what is refused before anything is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.config.compose import compose
from distill.errors import ConfigError
from distill.job import bundle
from distill.job.call_memory import memory_of_call
from distill.job.pool import KEEP, Pool, find_pool
from distill.job.problem import Problem
from distill.job.scores import Score, shared_out
from distill.job.swaps import amounts_of
from distill.student.assemble import assemble
from distill.teachers import build_architecture

SHAPE, CPU = (3, 16, 16), torch.device("cpu")
FEW = "search.candidates=[{recipe: skip},{recipe: separable,rank: 1},{recipe: one_conv,blocks: layer3.*}]"


def pool_of(*settings: str, candidates: str = FEW) -> tuple[nn.Module, Pool]:
    teacher = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10).eval()
    small = ["data=digits", "data.image_size=16", "data.batch_size=4", candidates]
    return teacher, find_pool(compose([*small, *settings]), SHAPE, teacher, CPU)


def test_candidates_are_in_the_order_of_blocks_and_only_where_they_are_asked_for() -> None:
    _, pool = pool_of("search.budget.params=0.5")
    names = [(pool.chain.blocks[swap.first].name, swap.label) for swap in pool.swaps]
    assert names[:3] == [("layer1.0", "skip"), ("layer1.0", "separable rank=1"), ("layer1.1", "skip")]
    assert [name for name, label in names if label == "one_conv"] == ["layer3.0", "layer3.1", "layer3.2"]
    assert pool.remarks == ("without candidates, they stay: conv1, linear",)


def test_amounts_of_a_choice_are_those_of_the_student_that_it_makes() -> None:
    teacher, pool = pool_of("search.budget.params=0.5")
    numbers = [number for number, swap in enumerate(pool.swaps) if swap.label in ("skip", "one_conv")]
    numbers = list({pool.swaps[number].first: number for number in numbers}.values())
    blocks = pool.with_swaps(numbers)
    student = assemble(teacher, changed=blocks.changed, blocks=())
    found = amounts_of(student, torch.empty(1, *SHAPE))
    assert found == {
        name: pool.teacher[name] + sum(pool.swaps[number].amounts[name] for number in numbers) for name in found
    }
    assert found["params"] < pool.teacher["params"] == sum(one.numel() for one in teacher.parameters())


def test_of_candidates_that_come_to_the_same_the_first_is_taken() -> None:
    both = "search.candidates=[{recipe: thin, ratio: 0.5},{recipe: thin, ratio: 0.51},{recipe: thin, ratio: 0.25}]"
    _, pool = pool_of("search.budget.params=0.9", "student.align=16", candidates=both)
    labels = {swap.label for swap in pool.swaps if swap.first == 9}
    assert labels == {"thin ratio=0.5", "thin ratio=0.25"}


def test_the_default_pool_has_something_of_every_kind() -> None:
    _, pool = pool_of("search.budget.params=0.5", "student.align=8", candidates="search.candidates=[]")
    kinds = {swap.name for swap in pool.swaps}
    assert kinds == {"skip", "separable", "lowrank", "thin", "halved", "one_conv"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["search.budget.params=0.01"], r"search\.budget\.params: got 0\.01; expected at least [0-9.]+ k: the least"),
        (["search.budget.bytes=10kB"], r"search\.budget\.bytes: got '10kB'; expected at least [0-9.]+ kB"),
        (["search.budget.params=1", "search.budget.flops=1"], r"search\.budget\.params: got 1; expected less than"),
        (["search.budget.params=0.5", "blocks.include=[conv1]"], r"search\.candidates: .* makes a block cheaper"),
        (["search.budget.params=0.5", "search.candidates=[{recipe: skip, blocks: la9}]"], r"\[0\]\.blocks: .*layer3"),
        (["search.budget.params=0.5", "search.candidates=[{recipe: thin, rato: 0.5}]"], r"\[0\]\.rato: .*'ratio'"),
        (["search.budget.memory=100kB"], r"search\.budget\.memory: .*at least [0-9.]+ MB: the least"),
        (["search.budget.params=0.5", "search.candidates=[{recipe: keep}]"], r"search\.candidates: .*cheaper"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_the_setting(settings: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        pool_of(*settings)


STREAMS = "search.candidates=[{recipe: stream, ratio: 0.5},{recipe: separable, rank: 1},{recipe: skip}]"


def test_streams_alone_and_neighbours_together_stand_for_all_their_blocks() -> None:
    _, pool = pool_of("search.budget.params=0.9", "student.align=8", candidates=STREAMS)
    streams = [(pool.place_name(n), swap.label) for n, swap in enumerate(pool.swaps) if swap.name == "stream"]
    one, two, three = "conv1", "layer2.0.conv2", "layer3.0.conv2"
    assert streams == [
        ("conv1..linear", f"stream ratio=0.5 of {one}"),
        ("conv1..linear", f"stream ratio=0.5 of {one} to {two}"),
        ("conv1..linear", f"stream ratio=0.5 of {one} to {three}"),
        ("layer2.0..linear", f"stream ratio=0.5 of {two}"),
        ("layer2.0..linear", f"stream ratio=0.5 of {two} to {three}"),
        ("layer3.0..linear", f"stream ratio=0.5 of {three}"),
    ]
    assert all(one.trains for one in pool.example.candidates.values())


@pytest.mark.parametrize(("memory", "place"), [(0.93, "layer2.0..linear"), (0.67, "conv1..linear")])
def test_what_is_predicted_of_a_choice_with_streams_is_what_its_student_has(memory: float, place: str) -> None:
    settings = f"search.budget.memory={memory}", "student.align=8", "deploy.batch=64"
    teacher, pool = pool_of(*settings, candidates=STREAMS)
    losses = {"stream": 1.0, "separable": 8.0, "skip": 9.0}
    scores = [Score(0.1, losses[swap.name]) for swap in pool.swaps]
    problem = Problem.of(compose(list(settings)), pool, scores)
    few = problem.best_few(3)
    assert [pool.place_name(number) for number in problem.swaps(few[0])] == [place]
    assert set(problem.labels(few[0])) == {pool.chain.blocks[block].name for block in pool.blocks}
    for choice in few:
        swaps, predicted = problem.swaps(choice), problem.predicted(choice)
        blocks = pool.with_swaps(swaps)
        assert len(blocks.candidates) == sum(len(pool.swaps[number].members) for number in swaps)
        student = assemble(teacher, changed=blocks.changed, blocks=())
        assert predicted["memory"] == memory_of_call(student, SHAPE, 64) <= memory * pool.teacher["memory"]
        assert {name: predicted[name] for name in ("params", "flops", "bytes")} == amounts_of(
            student, torch.empty(1, *SHAPE)
        )
        if len(swaps) == 1:
            assert pool.teacher["memory"] + pool.more(*swaps)["memory"] == predicted["memory"]


def test_a_bundle_for_another_device_has_all_of_them() -> None:
    teacher, pool = pool_of("search.budget.params=0.5")
    few = FEW.replace("]", ",{recipe: stream,ratio: 0.5}]")
    config = compose(["data=digits", "data.image_size=16", "data.batch_size=4", few, "search.budget.params=0.5"])
    _, found = bundle._candidates(config, SHAPE, teacher)
    assert {*found} == {*((block, block + 1) for block in pool.blocks), (4, 11), (7, 11)}
    assert [*found[7, 8]] == ["skip in layer3.0", "separable rank=1 in layer3.0", "one_conv in layer3.0"]
    assert [*found[7, 11]] == ["stream ratio=0.5 of layer3.0.conv2 in layer3.0..linear"]


def test_ranks_have_runs_of_candidates_of_about_the_same_cost() -> None:
    _, pool = pool_of("search.budget.params=0.5")
    for ranks in (1, 2, 3, 40):
        runs = shared_out(pool, ranks)
        assert len(runs) == ranks
        assert [number for run in runs for number in run] == list(range(len(pool.swaps)))
    assert 0.3 < len(shared_out(pool, 2)[0]) / len(pool.swaps) < 0.5  # the first ones have more behind them


def test_a_candidate_without_a_score_is_no_option_and_blocks_may_stay() -> None:
    _, pool = pool_of("search.budget.params=0.5")
    config = compose(["search.budget.params=0.5"])
    scores = [Score(0.1, None if swap.label == "skip" else 0.01) for swap in pool.swaps]
    problem = Problem.of(config, pool, scores)
    (best,) = problem.best_few(1)
    labels = problem.labels(best)
    assert "skip" not in labels.values()
    assert set(labels.values()) > {KEEP}
    assert problem.predicted(best)["params"] <= 0.5 * pool.teacher["params"]
    found = problem.with_more("params")
    assert found is not None
    assert found[1].loss < best.loss
